"""The single environment: its contract with Gymnasium and stable-baselines3, its seeds and its rewards."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from small_table import LAYERS, PROMPTS, WIDTH
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from deepinsert.envs import (
    InsertLayerEnv,
    InsertLayerVecEnv,
    Normaliser,
    RewardTable,
    SkipWeights,
    prompt_embeddings,
)
from deepinsert.envs.registration import ENV_ID


def episodes(env, seed, count=20):
    """The observations, rewards and infos of `count` episodes with random actions."""
    records = []
    env.action_space.seed(seed)
    observation, info = env.reset(seed=seed)
    for _ in range(count):
        step = env.step(env.action_space.sample())
        records.append((observation.tolist(), step[0].tolist(), *step[1:4], step[4] | info))
        observation, info = env.reset()
    return records


def test_gymnasium_check_env_without_a_warning(env):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check_env(env.unwrapped)


def test_sb3_check_env_without_a_warning(env):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sb3_check_env(env)
        sb3_check_env(env.unwrapped)


def test_both_checks_on_a_backbone_without_a_warning(tiny_backbone, six_prompts):
    env = gymnasium.make(ENV_ID, backbone=tiny_backbone, prompts=six_prompts, skip_weight=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check_env(env.unwrapped)
        sb3_check_env(env)


def test_rewards_come_from_the_backbone_s_losses(tiny_backbone, six_prompts):
    env = gymnasium.make(
        ENV_ID,
        backbone=tiny_backbone,
        prompts=six_prompts,
        insert_layers=(1, 8),
        skip_weight=0.25,
        bonus="flops",
        batch_size=4,
    )
    table = RewardTable(tiny_backbone, six_prompts, (1, 8))
    rewards = table.rewards(0.25, "flops")
    embeddings = prompt_embeddings(tiny_backbone, six_prompts)
    normal = Normaliser.fit(embeddings)(embeddings)
    for index in (5, 0, 5):
        for action in (1, 0):
            observation, info = env.reset(options={"prompt": index})
            np.testing.assert_array_equal(observation, normal[index])
            assert info == {"prompt": index, "prompt_id": six_prompts[index].id, "skip_weight": 0.25}
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
    sequences = []
    for action in (0, 3):
        prompts = [env.reset(seed=9)[1]["prompt"]]
        for _ in range(20):
            env.step(action)
            prompts.append(env.reset()[1]["prompt"])
        sequences.append(prompts)
    assert sequences[0] == sequences[1]


def test_prompts_are_drawn_uniformly(env):
    env.reset(seed=0)
    counts = np.bincount([env.reset()[1]["prompt"] for _ in range(6000)], minlength=PROMPTS)
    assert len(counts) == PROMPTS
    # Each prompt is expected 500 times, with standard deviation 21.
    assert (abs(counts - 500) < 100).all()


def test_a_chosen_prompt_draws_nothing(env):
    env.reset(seed=1)
    expected = [env.reset()[1]["prompt"] for _ in range(5)]
    env.reset(seed=1)
    env.reset(options={"prompt": 7})
    assert [env.reset()[1]["prompt"] for _ in range(5)] == expected


@pytest.mark.parametrize("index", [-1, PROMPTS, 1.5, "0", True])
def test_an_unknown_prompt_is_refused(env, index):
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


def test_arguments_that_do_not_go_together_are_refused(table, observations, tiny_backbone, six_prompts):
    for arguments in (
        {},
        {"table": table},
        {"backbone": tiny_backbone},
        {"table": table, "observations": observations, "backbone": tiny_backbone, "prompts": six_prompts},
        {"table": table, "observations": observations, "insert_layers": (0, 1)},
    ):
        with pytest.raises(TypeError):
            InsertLayerEnv(**arguments)
    with pytest.raises(ValueError, match="skip_weight"):
        InsertLayerEnv(table=table, observations=observations, skip_weight=-1)


def test_reading_the_spec_copies_no_backbone(tiny_backbone, six_prompts):
    env = gymnasium.make(ENV_ID, backbone=tiny_backbone, prompts=six_prompts)
    assert env.spec.kwargs["backbone"] is tiny_backbone
    assert env.unwrapped.spec.id == ENV_ID


def test_ppo_on_gymnasium_make(table, observations):
    # By default, make_vec_env asks for a render mode.
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


def test_both_checks_on_a_range_of_skip_weights_without_a_warning(ranged_env):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check_env(ranged_env.unwrapped)
        sb3_check_env(ranged_env)


def test_each_episode_draws_its_skip_weight_for_observation_and_reward(ranged_env, table, observations):
    weights = set()
    for episode in range(30):
        observation, info = ranged_env.reset(seed=7 if episode == 0 else None)
        weight, prompt = info["skip_weight"], info["prompt"]
        expected = [observations[prompt], SkipWeights(0.2, 1.2).features_of([weight])[0]]
        np.testing.assert_array_equal(observation, np.concatenate(expected).astype(np.float32))
        terminal, reward, *_, after = ranged_env.step(2)
        np.testing.assert_array_equal(terminal, observation)
        assert after["skip_weight"] == weight
        assert reward == pytest.approx(table.rewards(weight)[prompt, 2])
        weights.add(weight)
    assert len(weights) > 20 and all(0.2 <= weight <= 1.2 for weight in weights)
    assert ranged_env.reset(options={"prompt": 3, "skip_weight": 0.7})[1]["skip_weight"] == 0.7
    with pytest.raises(ValueError, match=r"outside 0\.2 to 1\.2"):
        ranged_env.reset(options={"skip_weight": 1.3})


def test_one_skip_weight_leaves_observation_and_draws_as_they_are(env, ranged_env):
    assert env.observation_space.shape == (WIDTH,)
    assert ranged_env.observation_space.shape == (WIDTH + SkipWeights(0.2, 1.2).num_features,)
    assert [env.reset(seed=4)[1]["prompt"], env.reset()[1]["prompt"]] == [
        int(number) for number in np.random.Generator(np.random.PCG64(4)).integers(PROMPTS, size=2)
    ]


def test_rewards_are_read_from_a_folder_and_added_to_it(tiny_backbone, six_prompts, tmp_path):
    first = gymnasium.make(
        ENV_ID, backbone=tiny_backbone, prompts=six_prompts, insert_layers=(0, 4), table=tmp_path
    )
    first.reset(options={"prompt": 0})
    loss = first.step(1)[4]["loss"]
    first.close()
    second = InsertLayerEnv(tiny_backbone, six_prompts, insert_layers=(0, 4), table=tmp_path)
    assert second.table.losses[0, 1] == loss and np.isnan(second.table.losses).any()
    second.table.fill()
    loaded = RewardTable.load(tmp_path)
    embeddings = prompt_embeddings(tiny_backbone, six_prompts)
    alone = InsertLayerEnv(table=tmp_path, observations=embeddings, normaliser=Normaliser.fit(embeddings))
    np.testing.assert_array_equal(alone.table.losses, loaded.losses)
    assert InsertLayerVecEnv(tmp_path, embeddings).table.complete
    with pytest.raises(TypeError, match="give its folder"):
        InsertLayerEnv(tiny_backbone, six_prompts, table=second.table)
