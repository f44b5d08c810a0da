"""Training on tables whose best policy is known, the judgement, and the command on the embedded backbone."""

import csv
import functools
import json
import random

import numpy as np
import pytest
import torch
from synthetic_tables import LAYERS, clustered_table, constant_table, structureless_table

from controller.options import TrainPolicyOptions
from controller.policy import LayerPolicy
from controller.training import isolated_random_state, judge_policy, run, train_policy
from envs.rewards import RewardTable

SKIP_WEIGHT = 0.5
STEPS = 20_480


def train_on_first(table, observations, **options):
    """A policy trained on three quarters of the prompts, and its judgement on the rest."""
    train = np.arange(len(table)) < 0.75 * len(table)
    policy = train_policy(
        table.subset(train), observations[train], skip_weight=SKIP_WEIGHT, steps=STEPS, **options
    )
    return policy, judge_policy(policy, table, observations, train)


@functools.cache
def clustered_training(seed):
    table, observations = clustered_table(seed)
    return table, observations, *train_on_first(table, observations, seed=seed)


def test_policy_reaches_the_optimum_of_a_known_table():
    table, observations = constant_table()
    policy, judgement = train_on_first(table, observations)
    assert (policy.act(observations) == 5).all()
    assert judgement["reward"]["policy"] == judgement["reward"]["oracle"]
    assert judgement["mean_insert_layer"] == 5 and judgement["mean_depth"] == 5 / LAYERS
    assert "for every held-out prompt" in judgement["verdict"]


@pytest.mark.parametrize("seed", [0, 1])
def test_policy_beats_every_fixed_layer_where_the_best_differs_by_prompt(seed):
    table, _, _, judgement = clustered_training(seed)
    assert judgement["difference"]["policy_minus_best_fixed"]["confidence_interval"][0] > 0
    held_out = table.rewards(SKIP_WEIGHT)[600:]
    assert judgement["reward"]["policy"]["reward"] > held_out.mean(axis=0).max()
    assert judgement["share_of_gap"] > 0.9
    assert "earns more than the best fixed layer" in judgement["verdict"]


def test_without_structure_the_verdict_prefers_the_fixed_layer():
    policy, judgement = train_on_first(*structureless_table())
    low, high = judgement["difference"]["policy_minus_best_fixed"]["confidence_interval"]
    assert low <= 0 <= high and policy.training.best_fixed == 3
    assert "for every held-out prompt" in judgement["verdict"] or "as good" in judgement["verdict"]


def test_judgement_agrees_with_the_table():
    table, observations, policy, judgement = clustered_training(seed=0)
    rewards, held_out = table.rewards(SKIP_WEIGHT), np.arange(len(table)) >= 600
    fixed = rewards[~held_out].mean(axis=0).argmax()
    layers = policy.act(observations[held_out])
    reward = judgement["reward"]
    assert reward["policy"]["reward"] == pytest.approx(rewards[held_out, layers].mean())
    assert reward["best_fixed"]["insert_layer"] == fixed
    assert reward["best_fixed"]["reward"] == pytest.approx(rewards[held_out, fixed].mean())
    assert reward["layer_0"]["reward"] == pytest.approx(rewards[held_out, 0].mean())
    assert reward["uniform"]["reward"] == pytest.approx(rewards[held_out].mean())
    assert reward["oracle"]["reward"] == pytest.approx(rewards[held_out].max(axis=1).mean())
    assert sum(judgement["histogram"].values()) == held_out.sum()
    for row in reward.values():
        low, high = row["confidence_interval"]
        assert low < row["reward"] < high
    assert reward["uniform"]["reward"] < reward["policy"]["reward"] <= reward["oracle"]["reward"]
    assert reward["nearest_neighbours"]["reward"] > reward["best_fixed"]["reward"]


def test_layer_0_is_absent_from_the_judgement_where_it_is_no_candidate():
    table, observations = clustered_table(prompts=80)
    deeper = RewardTable.from_losses(table.losses[:, 1:], range(1, LAYERS), LAYERS)
    train = np.arange(80) < 60
    policy = train_policy(deeper.subset(train), observations[train], steps=1)
    assert judge_policy(policy, deeper, observations, train)["reward"]["layer_0"] is None


def test_same_seed_gives_the_same_policy_bit_for_bit(tmp_path):
    table, observations = clustered_table(prompts=200)
    for folder, seed, noise in [("a", 3, 1), ("b", 3, 2), ("c", 4, 1)]:
        torch.manual_seed(noise)  # what happened before must not matter
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
    with pytest.raises(ZeroDivisionError), isolated_random_state():
        torch.manual_seed(5)
        _ = 1 / 0
    assert state() == before


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
    train_policy(table, observations, steps=1, log_folder=tmp_path)
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1  # an earlier start's are removed


@pytest.fixture(scope="module")
def policy_run(tmp_path_factory, rendered_data):
    options = TrainPolicyOptions(
        out=tmp_path_factory.mktemp("policy"),
        data=rendered_data,
        fraction=0.5,
        insert_layers="0-2,5",
        steps=4096,
        device="cpu",
    )
    return options, run(options)


def test_command_writes_what_the_contract_names(policy_run, tiny_backbone):
    options, result = policy_run
    assert result == json.loads((options.out / "result.json").read_text())
    assert result["skip_weight"] == 0.5 and result["insert_layers"] == [0, 1, 2, 5]
    assert 0 <= result["mean_insert_layer"] <= 5
    assert result["mean_depth"] == pytest.approx(result["mean_insert_layer"] / tiny_backbone.num_layers)
    for name in ("policy", "best_fixed", "layer_0", "oracle", "uniform"):
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


def test_command_continues_from_its_table_to_the_same_end(policy_run, monkeypatch):
    options, result = policy_run
    weights = (options.out / "policy.safetensors").read_bytes()
    (options.out / "result.json").unlink()
    monkeypatch.setattr(RewardTable, "_compute_group", None)  # every loss is there already
    assert run(options) == result
    assert (options.out / "policy.safetensors").read_bytes() == weights


def test_command_refuses_data_that_leave_nothing_to_judge_by(tmp_path, rendered_data):
    records = json.loads(rendered_data.read_text())
    one = next(record for record in records if record.get("image"))
    data = tmp_path / "one.json"
    data.write_text(json.dumps([one]))
    options = TrainPolicyOptions(out=tmp_path / "run", data=data, image_root=rendered_data.parent)
    with pytest.raises(ValueError, match="to judge by"):
        run(options)
    with pytest.raises(ValueError, match="--steps 0"):
        run(TrainPolicyOptions(out=tmp_path / "run", data=data, steps=0))
