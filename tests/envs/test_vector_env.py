"""The vector environment: rewards equal to the single environment's, seeds, and resumable state."""

from __future__ import annotations

import json

import numpy as np
import pytest
from small_table import LAYERS, PROMPTS
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor

from deepinsert.envs import InsertLayerVecEnv, Prompt, RewardTable, prompt_embeddings
from deepinsert.envs.rewards.keys import MIN_GROUP_PROMPTS


def test_vector_env_gives_the_rewards_of_the_env(env, table, observations):
    vec = InsertLayerVecEnv(table, observations, 5, skip_weight=0.5, relative_to_layer_0=False)
    rng = np.random.default_rng(0)
    current = vec.reset()
    for _ in range(20):
        actions = rng.integers(len(LAYERS), size=5)
        after, rewards, dones, infos = vec.step(actions)
        assert dones.all() and rewards.dtype == np.float32
        for index, info in enumerate(infos):
            start, _ = env.reset(options={"prompt": info["prompt"]})
            np.testing.assert_array_equal(current[index], start)
            np.testing.assert_array_equal(info["terminal_observation"], start)
            _, reward, _, _, single = env.step(actions[index])
            assert info["reward"] == reward and rewards[index] == np.float32(reward)
            assert {name: info[name] for name in single} == single
            assert info["TimeLimit.truncated"] is False
        current = after


@pytest.mark.parametrize("bonus", ["depth", "flops"])
def test_relative_rewards_are_shifted_by_the_prompt_s_first_layer(table, observations, bonus):
    vec = InsertLayerVecEnv(table, observations, 8, skip_weight=0.7, bonus=bonus)
    rewards = table.rewards(0.7, bonus)
    vec.reset()
    for action in range(len(LAYERS)):
        _, shifted, _, infos = vec.step(np.full(8, action))
        for reward, info in zip(shifted, infos, strict=True):
            row = rewards[info["prompt"]]
            assert info["reward"] == row[action]
            assert reward == pytest.approx(row[action] - row[0], abs=1e-6)
        if action == 0:
            assert (shifted == 0).all()


def test_relative_rewards_keep_the_best_layer(table, observations):
    vec = InsertLayerVecEnv(table, observations, 1)
    for prompt in range(PROMPTS):
        rewards = []
        for action in range(len(LAYERS)):
            vec.set_options({"prompt": prompt})
            vec.reset()
            rewards.append(vec.step(np.array([action]))[1][0])
        assert np.argmax(rewards) == np.argmax(table.rewards(0.5)[prompt])


def play(vec, steps, actions):
    """The observations, rewards and prompts of some steps with actions from a generator."""
    return [
        (obs.tolist(), rewards.tolist(), [info["prompt"] for info in infos])
        for obs, rewards, _, infos in (vec.step(actions.integers(len(LAYERS), size=3)) for _ in range(steps))
    ]


def test_vector_env_is_seeded(table, observations):
    def run(seed):
        vec = InsertLayerVecEnv(table, observations, 3, seed=seed)
        return [vec.reset().tolist(), *play(vec, 10, np.random.default_rng(0))]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_seed_takes_effect_at_the_next_reset(table, observations):
    vec = InsertLayerVecEnv(table, observations, 3, seed=0)
    vec.seed(11)
    first = vec.reset().tolist()
    second = vec.reset().tolist()
    vec.seed(11)
    assert vec.reset().tolist() == first
    assert vec.reset().tolist() == second


def test_state_resumes_bit_for_bit(table, observations):
    vec = InsertLayerVecEnv(table, observations, 3, seed=0)
    vec.reset()
    play(vec, 4, np.random.default_rng(0))
    state = vec.get_state()
    expected = play(vec, 6, np.random.default_rng(1))
    other = InsertLayerVecEnv(table, observations, 3, seed=99)
    pending = other.set_state(state)
    np.testing.assert_array_equal(pending, observations.astype(np.float32)[state["prompts"]])
    assert play(other, 6, np.random.default_rng(1)) == expected
    with pytest.raises(ValueError, match="3 prompts in play"):
        InsertLayerVecEnv(table, observations, 4).set_state(state)


def test_changing_a_returned_observation_changes_no_other(table, observations):
    vec = InsertLayerVecEnv(table, observations, 3, seed=0)
    first = vec.reset()
    first[:] = 99
    _, _, _, infos = vec.step(np.zeros(3, dtype=int))
    assert all(abs(info["terminal_observation"]).max() <= 10 for info in infos)
    assert abs(vec.observations).max() <= 10


def test_missing_rewards_are_computed_in_groups(tiny_backbone, six_prompts):
    text_prompts = [
        Prompt.from_question(f"Which number follows {n}?", answer="4") for n in range(MIN_GROUP_PROMPTS)
    ]
    prompts = [*six_prompts, *text_prompts]
    table = RewardTable(tiny_backbone, prompts, (0, 4))
    vec = InsertLayerVecEnv(table, prompt_embeddings(tiny_backbone, prompts), 4)
    group = table.groups[0]
    rows = [int(group[index % len(group)]) for index in range(4)]
    vec.set_options([{"prompt": row} for row in rows])
    vec.reset()
    _, _, _, infos = vec.step(np.ones(4, dtype=int))
    computed = ~np.isnan(table.losses)  # Losses at insert layer 4, and at 0 for comparison.
    assert computed[group].all() and computed.sum() == 2 * len(group) < computed.size
    whole = RewardTable(tiny_backbone, prompts, (0, 4))
    whole.fill()
    assert [info["loss"] for info in infos] == [whole.losses[index, 1] for index in rows]


@pytest.mark.parametrize("actions", [[0, 1], [0, 1, 4], [-1, 0, 0]])
def test_vector_env_refuses_bad_actions(table, observations, actions):
    vec = InsertLayerVecEnv(table, observations, 3)
    vec.reset()
    with pytest.raises(ValueError, match="actions"):
        vec.step(np.array(actions))


def test_ppo_on_the_vector_env_is_reproducible(table, observations):
    def train():
        vec = VecMonitor(InsertLayerVecEnv(table, observations, 16, seed=0))
        model = PPO("MlpPolicy", vec, n_steps=8, batch_size=64, gamma=0, seed=0, device="cpu")
        return model.learn(512)

    first, second = train(), train()
    state = second.policy.state_dict()
    assert all((value == state[name]).all() for name, value in first.policy.state_dict().items())
    assert len(first.ep_info_buffer) > 0


def test_vector_env_gives_the_rewards_of_the_env_over_a_range(ranged_env, table, observations):
    vec = InsertLayerVecEnv(table, observations, 5, skip_weight=(0.2, 1.2), relative_to_layer_0=False)
    current = vec.reset()
    for _ in range(10):
        actions = np.arange(5) % len(LAYERS)
        after, rewards, _, infos = vec.step(actions)
        for index, info in enumerate(infos):
            options = {"prompt": info["prompt"], "skip_weight": info["skip_weight"]}
            start, _ = ranged_env.reset(options=options)
            np.testing.assert_array_equal(current[index], start)
            np.testing.assert_array_equal(info["terminal_observation"], start)
            _, reward, _, _, single = ranged_env.step(actions[index])
            assert rewards[index] == np.float32(reward)
            assert {name: info[name] for name in single} == single
        current = after


def test_state_of_a_range_resumes_bit_for_bit(table, observations):
    arguments = {"num_envs": 3, "skip_weight": (0.0, 2.0)}
    vec = InsertLayerVecEnv(table, observations, seed=0, **arguments)
    vec.reset()
    play(vec, 4, np.random.default_rng(0))
    state = json.loads(json.dumps(vec.get_state()))
    expected = play(vec, 6, np.random.default_rng(1))
    other = InsertLayerVecEnv(table, observations, seed=99, **arguments)
    other.set_state(state)
    assert play(other, 6, np.random.default_rng(1)) == expected
    with pytest.raises(ValueError, match=r"outside 0 to 0\.1"):
        InsertLayerVecEnv(table, observations, 3, skip_weight=(0, 0.1)).set_state(state)
