"""Training on tables with a known best policy, the comparison with baselines, and the command."""

import csv
import functools
import json
import random
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from synthetic_tables import LAYERS, clustered_table, constant_table, graded_table, structureless_table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deepinsert.controller.learning.train_policy import (
    compare_policies,
    isolated_random_state,
    run,
    train_policy,
)
from deepinsert.controller.options import TrainPolicyOptions
from deepinsert.controller.policy.layer_policy import LayerPolicy
from deepinsert.controller.studies.lambda_study import study
from deepinsert.envs.observations import Normaliser
from deepinsert.envs.rewards.group_forward import GroupForward
from deepinsert.envs.rewards.table import RewardTable
from deepinsert.envs.skip_weights import SkipWeights

SKIP_WEIGHT = 0.5
STEPS = 20_480


def train_on_first(table, observations, **options):
    """Train a policy on three quarters of the prompts and compare it with baselines on the others."""
    train = np.arange(len(table)) < 0.75 * len(table)
    options = {"skip_weight": SKIP_WEIGHT, "steps": STEPS, **options}
    policy = train_policy(table.subset(train), observations[train], **options)
    return policy, compare_policies({policy.seed: policy}, table, observations, train)


@functools.cache
def clustered_training(seed):
    table, observations = clustered_table(seed)
    return table, observations, *train_on_first(table, observations, seed=seed)


def test_policy_reaches_the_optimum_of_a_known_table():
    table, observations = constant_table()
    policy, comparison = train_on_first(table, observations)
    assert (policy.act(observations) == 5).all()
    assert comparison["reward"]["policy"] == comparison["reward"]["oracle"]
    assert comparison["mean_insert_layer"] == 5 and comparison["mean_depth"] == 5 / LAYERS
    assert "for every held-out prompt" in comparison["verdict"]


@pytest.mark.parametrize("seed", [0, 1])
def test_policy_beats_every_fixed_layer_where_the_best_differs_by_prompt(seed):
    table, _, _, comparison = clustered_training(seed)
    assert comparison["difference"]["policy_minus_best_fixed"]["confidence_interval"][0] > 0
    held_out = table.rewards(SKIP_WEIGHT)[600:]
    assert comparison["reward"]["policy"]["reward"] > held_out.mean(axis=0).max()
    assert comparison["share_of_gap"] > 0.9
    assert "earns more than the best fixed layer" in comparison["verdict"]


def test_without_structure_the_verdict_prefers_the_fixed_layer():
    policy, comparison = train_on_first(*structureless_table())
    low, high = comparison["difference"]["policy_minus_best_fixed"]["confidence_interval"]
    assert low <= 0 <= high and policy.training.best_fixed == 3
    assert "for every held-out prompt" in comparison["verdict"] or "as good" in comparison["verdict"]


@functools.cache
def graded_training(algorithm):
    """Train a policy for a range of λ on a table like a real model's, and compare it at one λ."""
    table, observations = graded_table()
    train = np.arange(len(table)) < 0.75 * len(table)
    steps = {"ppo": 40_960, "a2c": 51_200, "dqn": 30_720, "full-info": 200_000}[algorithm]
    policy = train_policy(
        table.subset(train),
        observations[train],
        skip_weight=SKIP_WEIGHT,
        skip_weights=(0.0, 1.0),
        algorithm=algorithm,
        steps=steps,
    )
    return (
        table,
        observations,
        train,
        policy,
        compare_policies({policy.seed: policy}, table, observations, train),
    )


@pytest.mark.parametrize(
    ("algorithm", "least"), [("full-info", 0.6), ("ppo", 0.6), ("a2c", 0.5), ("dqn", 0.5)]
)
def test_every_algorithm_closes_the_gap_where_layers_can_be_foretold(algorithm, least):
    *_, policy, comparison = graded_training(algorithm)
    assert comparison["share_of_gap"] > least
    low, high = comparison["share_of_gap_interval"]
    assert 0.15 < low < comparison["share_of_gap"] < high < 1
    assert comparison["difference"]["policy_minus_best_fixed"]["confidence_interval"][0] > 0
    assert "earns more than the best fixed layer" in comparison["verdict"]
    assert policy.algorithm == algorithm and (policy.skip_weights.low, policy.skip_weights.high) == (0, 1)


@pytest.mark.parametrize("algorithm", ["full-info", "a2c", "dqn"])
def test_no_algorithm_claims_a_gain_where_there_is_none(algorithm):
    steps = 100_000 if algorithm == "full-info" else STEPS
    _, comparison = train_on_first(*structureless_table(), algorithm=algorithm, steps=steps)
    low, high = comparison["difference"]["policy_minus_best_fixed"]["confidence_interval"]
    assert low <= 0 <= high
    assert "for every held-out prompt" in comparison["verdict"] or "as good" in comparison["verdict"]


def test_action_values_divided_by_their_error_are_logits():
    table, observations, train, policy, _ = graded_training("dqn")
    likely = policy.probabilities(observations[~train], 0.5)
    assert 0.15 < likely.max(axis=1).mean() < 0.99  # neither uniform nor certain
    rewards = table.rewards(0.5)[~train]
    sure = likely.max(axis=1) > np.median(likely.max(axis=1))
    regret = rewards.max(axis=1) - rewards[np.arange(len(rewards)), likely.argmax(axis=1)]
    assert regret[sure].mean() < regret[~sure].mean()


def test_one_policy_serves_every_skip_weight():
    """Quick version: at five λ the policy for the range is near one trained for each (slow: within 2 %)."""
    table, observations, train, policy, _ = graded_training("full-info")
    results = study(table, observations, train, algorithm="full-info", steps=100_000)
    assert [row["skip_weight"] for row in results["rows"]] == [0, 0.25, 0.5, 0.75, 1]
    assert results["least"] > -0.04
    for row in results["rows"]:
        rewards = table.rewards(row["skip_weight"])[~train]
        assert row["oracle"] == pytest.approx(rewards.max(axis=1).mean())
        assert f"| {row['skip_weight']:g} | {row['range']:.4f} | {row['single']:.4f} |" in results["markdown"]
        low, high = row["interval"]
        assert low <= row["range"] - row["single"] <= high
    depths = [policy.act(observations[~train], weight).mean() for weight in (0, 0.25, 0.5, 0.75, 1)]
    assert depths == sorted(depths) and depths[0] < 1 < depths[-1]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "full-info"])
def test_one_policy_is_within_two_per_cent_of_one_for_each_skip_weight(algorithm):
    table, observations = graded_table()
    results = study(table, observations, np.arange(len(table)) < 1500, algorithm=algorithm)
    assert results["least"] > -0.02, results["markdown"]


def test_an_unknown_algorithm_and_a_skip_weight_outside_the_range_are_refused():
    table, observations = clustered_table(prompts=20)
    with pytest.raises(ValueError, match="algorithm 'sac': choose one of ppo, a2c, dqn, full-info"):
        train_policy(table, observations, algorithm="sac")
    with pytest.raises(ValueError, match=r"2 is outside 0 to 1"):
        train_policy(table, observations, skip_weight=2, skip_weights=(0, 1))


def test_sb3_alone_trains_on_the_environment_and_gives_a_policy(tiny_backbone):
    table, observations = clustered_table(prompts=400)
    normaliser = Normaliser.fit(observations)
    env = gymnasium.make(
        "DeepInsert/InsertLayer-v0",
        table=table,
        observations=observations,
        normaliser=normaliser,
        skip_weight=SKIP_WEIGHT,
    )
    model = PPO("MlpPolicy", env, n_steps=512, batch_size=128, gamma=0, learning_rate=3e-3, seed=0)
    model.learn(4096)
    policy = LayerPolicy.from_sb3(
        model, table=table, normaliser=normaliser, backbone=tiny_backbone, skip_weights=SKIP_WEIGHT
    )
    rewards, rows = table.rewards(SKIP_WEIGHT), np.arange(len(table))
    columns = policy.columns(observations)
    actions, _ = model.predict(normaliser(observations), deterministic=True)
    assert (columns == actions).all()
    assert rewards[rows, columns].mean() > rewards.mean(axis=0).max()


def test_comparison_agrees_with_the_table():
    table, observations, policy, comparison = clustered_training(seed=0)
    rewards, held_out = table.rewards(SKIP_WEIGHT), np.arange(len(table)) >= 600
    fixed = rewards[~held_out].mean(axis=0).argmax()
    layers = policy.act(observations[held_out])
    reward = comparison["reward"]
    assert reward["policy"]["reward"] == pytest.approx(rewards[held_out, layers].mean())
    assert reward["best_fixed"]["insert_layer"] == fixed
    assert reward["best_fixed"]["reward"] == pytest.approx(rewards[held_out, fixed].mean())
    assert reward["layer_0"]["reward"] == pytest.approx(rewards[held_out, 0].mean())
    assert reward["uniform"]["reward"] == pytest.approx(rewards[held_out].mean())
    assert reward["oracle"]["reward"] == pytest.approx(rewards[held_out].max(axis=1).mean())
    assert sum(comparison["histogram"].values()) == held_out.sum()
    for row in reward.values():
        low, high = row["confidence_interval"]
        assert low < row["reward"] < high
    assert reward["uniform"]["reward"] < reward["policy"]["reward"] <= reward["oracle"]["reward"]
    assert reward["nearest_neighbours"]["reward"] > reward["best_fixed"]["reward"]


def test_layer_0_is_absent_from_the_comparison_where_it_is_no_candidate():
    table, observations = clustered_table(prompts=80)
    deeper = RewardTable.from_losses(table.losses[:, 1:], range(1, LAYERS), LAYERS)
    train = np.arange(80) < 60
    policy = train_policy(deeper.subset(train), observations[train], steps=1)
    assert compare_policies({policy.seed: policy}, deeper, observations, train)["reward"]["layer_0"] is None


def test_same_seed_gives_the_same_policy_bit_for_bit(tmp_path):
    table, observations = clustered_table(prompts=200)
    for folder, seed, noise in [("a", 3, 1), ("b", 3, 2), ("c", 4, 1)]:
        torch.manual_seed(noise)  # the global random state must not matter
        np.random.seed(noise)
        train_policy(table, observations, steps=4096, seed=seed).save(tmp_path / folder)
    files = {folder: (tmp_path / folder / "policy.safetensors").read_bytes() for folder in "abc"}
    assert files["a"] == files["b"] != files["c"]
    descriptions = [(tmp_path / folder / "policy.json").read_text() for folder in "ab"]
    assert descriptions[0] == descriptions[1]


def test_training_leaves_the_global_random_state_and_threads_alone():
    table, observations = clustered_table(prompts=50)

    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before, threads = state(), torch.get_num_threads()
    train_policy(table, observations, steps=1)
    assert state() == before and torch.get_num_threads() == threads

    def seed_and_raise():
        with isolated_random_state():
            torch.manual_seed(5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        seed_and_raise()
    assert state() == before


EVENT_TAGS = ("reward/total", "reward/performance", "reward/bonus", "policy/insert_layer")


def logged_events(folder):
    """Step, tag and value of the only event file's scalars about episodes."""
    (path,) = folder.glob("events.out.tfevents.*")
    events = EventAccumulator(str(path)).Reload()
    scalars = [(event.step, tag, event.value) for tag in EVENT_TAGS for event in events.Scalars(tag)]
    return sorted(scalars, key=lambda scalar: (scalar[0], EVENT_TAGS.index(scalar[1])))


def test_logs_hold_the_parts_of_the_reward(tmp_path):
    table, observations = clustered_table(prompts=200)
    train_policy(table, observations, skip_weight=SKIP_WEIGHT, steps=6144, log_folder=tmp_path)
    with (tmp_path / "progress.csv").open() as lines:
        rows = [{key: float(value or "nan") for key, value in row.items()} for row in csv.DictReader(lines)]
    assert [row["time/total_timesteps"] for row in rows] == [2048, 4096, 6144]
    for row in rows:
        assert row["reward/total"] == pytest.approx(row["reward/performance"] + row["reward/bonus"])
        assert row["reward/bonus"] == pytest.approx(SKIP_WEIGHT * row["policy/insert_layer"] / LAYERS)
    assert rows[0]["reward/performance"] == pytest.approx(-table.losses.mean(), abs=0.05)  # still uniform
    assert rows[-1]["reward/total"] > rows[0]["reward/total"]
    assert logged_events(tmp_path) == [
        (row["time/total_timesteps"], tag, np.float32(row[tag])) for row in rows for tag in EVENT_TAGS
    ]
    train_policy(table, observations, steps=1, log_folder=tmp_path)
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1  # those of an earlier start are removed


@pytest.fixture(scope="module")
def policy_run(tmp_path_factory, rendered_data):
    options = TrainPolicyOptions(
        out=tmp_path_factory.mktemp("policy"),
        data=rendered_data,
        fraction=0.5,
        insert_layers="0-2,5",
        steps=4096,
        seeds=3,
        device="cpu",
    )
    return options, run(options)


def test_command_writes_what_the_contract_names(policy_run, tiny_backbone):
    options, result = policy_run
    assert result == json.loads((options.out / "result.json").read_text())
    assert result["skip_weight"] == 0.5 and result["insert_layers"] == [0, 1, 2, 5]
    assert 0 <= result["mean_insert_layer"] <= 5
    assert result["mean_depth"] == pytest.approx(result["mean_insert_layer"] / tiny_backbone.num_layers)
    names = ["policy", "best_fixed", "layer_0", "oracle", "uniform", "nearest_neighbours", "ridge"]
    for name in [*names, "supervised_gate"]:
        low, high = result["reward"][name]["confidence_interval"]
        assert low <= result["reward"][name]["reward"] <= high
    for name in (
        "config.json",
        "table/_manifest.json",
        "policy.json",
        "policy.safetensors",
        "policy_rewards.png",
    ):
        assert (options.out / name).stat().st_size
    assert list(options.out.glob("events.out.tfevents.*")) and (options.out / "progress.csv").is_file()
    assert result["prompts"]["text_only_left_out"] > 0
    policy = LayerPolicy.load(options.out)
    assert policy.backbone_fingerprint == tiny_backbone.fingerprint
    assert policy.training.advantage is not None


def test_command_compares_every_seed_and_saves_the_first(policy_run):
    options, result = policy_run
    seeds = result["seeds"]
    assert [row["seed"] for row in seeds["each"]] == [0, 1, 2] and seeds["saved"] == 0
    assert seeds["each"][0]["reward"] == result["reward"]["policy"]["reward"]
    assert seeds["pooled"]["reward"] == pytest.approx(np.mean([row["reward"] for row in seeds["each"]]))
    assert result["reward"]["oracle"]["regret"] == 0
    policy = LayerPolicy.load(options.out)
    assert policy.seed == 0 and policy.skip_weight == 0.5 and policy.skip_weights == SkipWeights(0, 1)
    assert len(policy.training.frontier) == 13
    table = (options.out / "judgement.md").read_text()
    assert table.count("\n| ") == 9  # the policy, the mean of its seeds, and seven others
    assert f"| policy (seed 0) | {result['reward']['policy']['reward']:.4f} (" in table
    assert result["verdict"] in table


def test_command_takes_losses_from_a_table_and_the_observation_from_its_options(
    policy_run, rendered_data, tmp_path
):
    options, _ = policy_run
    other = replace(
        options,
        out=tmp_path,
        table=options.out / "table",
        batch_size=2,  # few prompts to measure times on
        observation="hidden:2",
        observe_image=True,
        algorithm="full-info",
        skip_weight_range="none",
        bonus="time",
        seeds=1,
        steps=20_000,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GroupForward, "run", None)  # every loss is there already
        result = run(other)
    assert not (tmp_path / "table").exists()
    assert result["observation"] == "hidden:2+image" and result["skip_weight_range"] == [0.5, 0.5]
    policy = LayerPolicy.load(tmp_path)
    assert policy.observation.text_layer == 2 and policy.observation.image
    assert policy.bonus == "time" and policy.algorithm == "full-info"
    times = json.loads((tmp_path / "times.json").read_text())["ratios"]
    assert policy.training.times == tuple(times)


def test_command_continues_from_its_table_to_the_same_end(policy_run, monkeypatch):
    options, result = policy_run
    weights = (options.out / "policy.safetensors").read_bytes()
    (options.out / "result.json").unlink()
    monkeypatch.setattr(GroupForward, "run", None)  # every loss is there already
    assert run(options) == result
    assert (options.out / "policy.safetensors").read_bytes() == weights


def test_command_refuses_data_that_leave_nothing_to_hold_out(tmp_path, rendered_data):
    records = json.loads(rendered_data.read_text())
    one = next(record for record in records if record.get("image"))
    data = tmp_path / "one.json"
    data.write_text(json.dumps([one]))
    options = TrainPolicyOptions(out=tmp_path / "run", data=data, image_root=rendered_data.parent)
    with pytest.raises(ValueError, match="to hold out"):
        run(options)
    with pytest.raises(ValueError, match="--steps 0"):
        run(TrainPolicyOptions(out=tmp_path / "run", data=data, steps=0))
