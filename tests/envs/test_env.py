"""Both environments: their spec, their seeds, and that stable-baselines3 and Gymnasium accept them."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor

from deepinsert.envs import (
    InsertLayerEnv,
    InsertLayerVecEnv,
    Normaliser,
    Prompt,
    RewardTable,
    SkipWeights,
    load_instructions,
    prompt_embeddings,
    prompts_from,
)
from deepinsert.envs.rewards.keys import LEAST_GROUP

ENV_ID = "DeepInsert/InsertLayer-v0"
PROMPTS, LAYERS, WIDTH = 12, (0, 2, 4, 7), 6


@pytest.fixture
def table():
    rng = np.random.default_rng(5)
    flops = rng.uniform(50, 100, (PROMPTS, len(LAYERS)))
    flops[:, 0] = 100
    return RewardTable.from_losses(rng.uniform(0, 3, (PROMPTS, len(LAYERS))), LAYERS, 8, flops=flops)


@pytest.fixture
def observations():
    return np.random.default_rng(6).normal(size=(PROMPTS, WIDTH))


@pytest.fixture
def env(table, observations):
    return gymnasium.make(ENV_ID, table=table, observations=observations, skip_weight=0.5)


@pytest.fixture(scope="module")
def prompts(rendered_data):
    return prompts_from(load_instructions(rendered_data))[:6]


def episodes(env, seed, count=20):
    """What happens in `count` episodes: observations, rewards, infos."""
    found = []
    env.action_space.seed(seed)
    observation, info = env.reset(seed=seed)
    for _ in range(count):
        step = env.step(env.action_space.sample())
        found.append((observation.tolist(), step[0].tolist(), *step[1:4], step[4] | info))
        observation, info = env.reset()
    return found


def test_gymnasium_check_env_without_a_warning(env):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check_env(env.unwrapped)


def test_sb3_check_env_without_a_warning(env):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sb3_check_env(env)
        sb3_check_env(env.unwrapped)


def test_both_checks_on_a_backbone_without_a_warning(tiny_backbone, prompts):
    env = gymnasium.make(ENV_ID, backbone=tiny_backbone, prompts=prompts, skip_weight=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check_env(env.unwrapped)
        sb3_check_env(env)


def test_the_backbone_s_own_losses_are_paid(tiny_backbone, prompts):
    env = gymnasium.make(
        ENV_ID,
        backbone=tiny_backbone,
        prompts=prompts,
        insert_layers=(1, 8),
        skip_weight=0.25,
        bonus="flops",
        batch_size=4,
    )
    table = RewardTable(tiny_backbone, prompts, (1, 8))
    rewards = table.rewards(0.25, "flops")
    embeddings = prompt_embeddings(tiny_backbone, prompts)
    normal = Normaliser.fit(embeddings)(embeddings)
    for index in (5, 0, 5):
        for action in (1, 0):
            observation, info = env.reset(options={"prompt": index})
            np.testing.assert_array_equal(observation, normal[index])
            assert info == {"prompt": index, "prompt_id": prompts[index].id, "skip_weight": 0.25}
            terminal, reward, terminated, truncated, info = env.step(action)
            np.testing.assert_array_equal(terminal, observation)
            assert (reward, terminated, truncated) == (rewards[index, action], True, False)
            assert info["insert_layer"] == (1, 8)[action]
            assert info["loss"] == table.losses[index, action]
            assert info["bonus"] == table.bonus("flops")[index, action]
            assert reward == -info["loss"] + 0.25 * info["bonus"]


def test_same_seed_same_episodes(env):
    assert episodes(env, seed=3) == episodes(env, seed=3)
    assert episodes(env, seed=3) != episodes(env, seed=4)


def test_actions_do_not_change_the_prompts(env):
    seen = []
    for action in (0, 3):
        prompts = [env.reset(seed=9)[1]["prompt"]]
        for _ in range(20):
            env.step(action)
            prompts.append(env.reset()[1]["prompt"])
        seen.append(prompts)
    assert seen[0] == seen[1]


def test_prompts_are_drawn_uniformly(env):
    env.reset(seed=0)
    counts = np.bincount([env.reset()[1]["prompt"] for _ in range(6000)], minlength=PROMPTS)
    assert len(counts) == PROMPTS
    # 500 expected each, standard deviation 21
    assert (abs(counts - 500) < 100).all()


def test_a_chosen_prompt_draws_nothing(env):
    env.reset(seed=1)
    expected = [env.reset()[1]["prompt"] for _ in range(5)]
    env.reset(seed=1)
    env.reset(options={"prompt": 7})
    assert [env.reset()[1]["prompt"] for _ in range(5)] == expected


@pytest.mark.parametrize("index", [-1, PROMPTS, 1.5, "0", True])
def test_a_prompt_that_is_not_there_is_refused(env, index):
    with pytest.raises(ValueError, match="index of a prompt"):
        env.reset(options={"prompt": index})


def test_an_episode_is_one_step(env):
    env.reset(seed=0)
    assert env.step(0)[2:4] == (True, False)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.unwrapped.step(0)


@pytest.mark.parametrize("action", [-1, len(LAYERS)])
def test_an_action_that_is_no_candidate_is_refused(env, action):
    env.reset(seed=0)
    with pytest.raises(ValueError, match="4 candidate layers"):
        env.unwrapped.step(action)


def test_observations_are_normalised_and_clipped(table, observations):
    far = observations.copy()
    far[3, 2] = 1e6
    env = InsertLayerEnv(table=table, observations=far)
    observation, _ = env.reset(options={"prompt": 3})
    assert observation[2] == 10 and observation in env.observation_space
    scaled = InsertLayerEnv(
        table=table, observations=observations, normaliser=Normaliser.fit(observations + 1)
    )
    observation, _ = scaled.reset(options={"prompt": 3})
    expected = (observations[3] - observations.mean(0) - 1) / observations.std(0)
    np.testing.assert_allclose(observation, expected, rtol=1e-4)


def test_arguments_that_do_not_go_together_are_refused(table, observations, tiny_backbone, prompts):
    for arguments in (
        {},
        {"table": table},
        {"backbone": tiny_backbone},
        {"table": table, "observations": observations, "backbone": tiny_backbone, "prompts": prompts},
        {"table": table, "observations": observations, "insert_layers": (0, 1)},
    ):
        with pytest.raises(TypeError):
            InsertLayerEnv(**arguments)
    with pytest.raises(ValueError, match="skip_weight"):
        InsertLayerEnv(table=table, observations=observations, skip_weight=-1)


def test_reading_the_spec_copies_no_backbone(tiny_backbone, prompts):
    env = gymnasium.make(ENV_ID, backbone=tiny_backbone, prompts=prompts)
    assert env.spec.kwargs["backbone"] is tiny_backbone
    assert env.unwrapped.spec.id == ENV_ID


def test_importing_envs_registers_the_environment_without_torch():
    program = (
        "import sys, envs, gymnasium; envs.register_envs();"
        f"assert {ENV_ID!r} in gymnasium.registry; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)


def test_ppo_on_gymnasium_make(table, observations):
    # make_vec_env asks for pictures unless told otherwise
    arguments = {"table": table, "observations": observations, "render_mode": None}
    vec_env = make_vec_env(ENV_ID, n_envs=4, seed=0, env_kwargs=arguments)
    model = PPO("MlpPolicy", vec_env, n_steps=16, batch_size=32, gamma=0, seed=0, device="cpu").learn(128)
    mean, _ = evaluate_policy(model, vec_env, n_eval_episodes=8)
    rewards = table.rewards(0.5)
    assert rewards.min() <= mean <= rewards.max()


def test_gymnasium_make_vec(table, observations):
    vec = gymnasium.make_vec(ENV_ID, num_envs=3, table=table, observations=observations)
    start, infos = vec.reset(seed=0)
    assert start.shape == (3, WIDTH)
    _, rewards, terminated, truncated, _ = vec.step(np.array([0, 1, 3]))
    expected = table.rewards(0.5)[infos["prompt"], [0, 1, 3]]
    np.testing.assert_allclose(rewards, expected)
    assert terminated.all() and not truncated.any()


# The vector environment


def test_vector_env_pays_what_the_env_pays(env, table, observations):
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
        _, paid, _, infos = vec.step(np.full(8, action))
        for reward, info in zip(paid, infos, strict=True):
            row = rewards[info["prompt"]]
            assert info["reward"] == row[action]
            assert reward == pytest.approx(row[action] - row[0], abs=1e-6)
        if action == 0:
            assert (paid == 0).all()


def test_relative_rewards_keep_the_best_layer(table, observations):
    vec = InsertLayerVecEnv(table, observations, 1)
    for prompt in range(PROMPTS):
        paid = []
        for action in range(len(LAYERS)):
            vec.set_options({"prompt": prompt})
            vec.reset()
            paid.append(vec.step(np.array([action]))[1][0])
        assert np.argmax(paid) == np.argmax(table.rewards(0.5)[prompt])


def play(vec, steps, actions):
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


def test_observations_handed_out_are_the_caller_s(table, observations):
    vec = InsertLayerVecEnv(table, observations, 3, seed=0)
    first = vec.reset()
    first[:] = 99
    _, _, _, infos = vec.step(np.zeros(3, dtype=int))
    assert all(abs(info["terminal_observation"]).max() <= 10 for info in infos)
    assert abs(vec.observations).max() <= 10


def test_missing_rewards_are_computed_in_groups(tiny_backbone, prompts):
    others = [Prompt.from_question(f"Which number follows {n}?", answer="4") for n in range(LEAST_GROUP)]
    prompts = [*prompts, *others]
    table = RewardTable(tiny_backbone, prompts, (0, 4))
    vec = InsertLayerVecEnv(table, prompt_embeddings(tiny_backbone, prompts), 4)
    group = table.groups[0]
    asked = [int(group[index % len(group)]) for index in range(4)]
    for index in range(4):
        vec._options[index] = {"prompt": asked[index]}
    vec.reset()
    _, _, _, infos = vec.step(np.ones(4, dtype=int))
    known = ~np.isnan(table.losses)  # at insert layer 4, and at 0 to compare with
    assert known[group].all() and known.sum() == 2 * len(group) < known.size
    whole = RewardTable(tiny_backbone, prompts, (0, 4))
    whole.fill()
    assert [info["loss"] for info in infos] == [whole.losses[index, 1] for index in asked]


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


# A range of skip weights


@pytest.fixture
def ranged(table, observations):
    return gymnasium.make(ENV_ID, table=table, observations=observations, skip_weight=(0.2, 1.2))


def test_both_checks_on_a_range_of_skip_weights_without_a_warning(ranged):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check_env(ranged.unwrapped)
        sb3_check_env(ranged)


def test_each_episode_draws_shows_and_pays_its_skip_weight(ranged, table, observations):
    drawn = set()
    for episode in range(30):
        observation, info = ranged.reset(seed=7 if episode == 0 else None)
        weight, prompt = info["skip_weight"], info["prompt"]
        expected = [observations[prompt], SkipWeights(0.2, 1.2).feature([weight])[0]]
        np.testing.assert_array_equal(observation, np.concatenate(expected).astype(np.float32))
        terminal, reward, *_, after = ranged.step(2)
        np.testing.assert_array_equal(terminal, observation)
        assert after["skip_weight"] == weight
        assert reward == pytest.approx(table.rewards(weight)[prompt, 2])
        drawn.add(weight)
    assert len(drawn) > 20 and all(0.2 <= weight <= 1.2 for weight in drawn)
    assert ranged.reset(options={"prompt": 3, "skip_weight": 0.7})[1]["skip_weight"] == 0.7
    with pytest.raises(ValueError, match=r"outside 0\.2 to 1\.2"):
        ranged.reset(options={"skip_weight": 1.3})


def test_one_skip_weight_leaves_observation_and_draws_as_they_are(env, ranged):
    assert env.observation_space.shape == (WIDTH,)
    assert ranged.observation_space.shape == (WIDTH + SkipWeights(0.2, 1.2).features,)
    assert [env.reset(seed=4)[1]["prompt"], env.reset()[1]["prompt"]] == [
        int(number) for number in np.random.Generator(np.random.PCG64(4)).integers(PROMPTS, size=2)
    ]


def test_vector_env_pays_a_range_as_the_env_does(ranged, table, observations):
    vec = InsertLayerVecEnv(table, observations, 5, skip_weight=(0.2, 1.2), relative_to_layer_0=False)
    current = vec.reset()
    for _ in range(10):
        actions = np.arange(5) % len(LAYERS)
        after, rewards, _, infos = vec.step(actions)
        for index, info in enumerate(infos):
            options = {"prompt": info["prompt"], "skip_weight": info["skip_weight"]}
            start, _ = ranged.reset(options=options)
            np.testing.assert_array_equal(current[index], start)
            np.testing.assert_array_equal(info["terminal_observation"], start)
            _, reward, _, _, single = ranged.step(actions[index])
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


def test_a_folder_s_rewards_are_taken_over_and_added_to(tiny_backbone, prompts, tmp_path):
    first = gymnasium.make(
        ENV_ID, backbone=tiny_backbone, prompts=prompts, insert_layers=(0, 4), table=tmp_path
    )
    first.reset(options={"prompt": 0})
    loss = first.step(1)[4]["loss"]
    first.close()
    second = InsertLayerEnv(tiny_backbone, prompts, insert_layers=(0, 4), table=tmp_path)
    assert second.table.losses[0, 1] == loss and np.isnan(second.table.losses).any()
    second.table.fill()
    loaded = RewardTable.load(tmp_path)
    seen = prompt_embeddings(tiny_backbone, prompts)
    alone = InsertLayerEnv(table=tmp_path, observations=seen, normaliser=Normaliser.fit(seen))
    np.testing.assert_array_equal(alone.table.losses, loaded.losses)
    assert InsertLayerVecEnv(tmp_path, seen).table.complete
    with pytest.raises(TypeError, match="give its folder"):
        InsertLayerEnv(tiny_backbone, prompts, table=second.table)
