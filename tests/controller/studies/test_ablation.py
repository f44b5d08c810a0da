"""The ablation of observations: its rows are those of the policies, and finished work is not repeated."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from deepinsert.controller.learning.train_policy import split_prompts
from deepinsert.controller.studies import ablation
from deepinsert.controller.studies.ablation import ObservationAblationOptions, chosen_observations, page
from deepinsert.envs import Observation, RewardTable


@pytest.fixture(scope="module")
def options(rendered_data, tmp_path_factory):
    return ObservationAblationOptions(
        out=tmp_path_factory.mktemp("ablation") / "run",
        data=rendered_data,
        sources="gqa,coco",
        algorithm="full-info",
        seeds=2,
        steps=20_000,
        observation="embeddings,hidden:2",
        device="cpu",
    )


@pytest.fixture(scope="module")
def result(options):
    return ablation.run(options)


def test_every_observation_is_compared_on_the_same_prompts(result, options, tiny_backbone):
    rows = result["observations"]
    names = ["embeddings", "hidden:2", "embeddings+image", "hidden:2+image"]
    assert [row["observation"] for row in rows] == names
    assert [row["width"] for row in rows] == [128, 128, 256, 256]
    train, held_out, _ = split_prompts(options)
    assert result["prompts"]["held_out"] == len(held_out)
    table = RewardTable(tiny_backbone, [*train, *held_out])
    rewards = table.rewards(options.skip_weight)
    held_out_rewards = rewards[len(train) :]
    fixed = int(rewards[: len(train)].mean(axis=0).argmax())
    assert result["best_fixed"]["insert_layer"] == fixed
    assert result["oracle"]["reward"] == pytest.approx(held_out_rewards.max(axis=1).mean(), abs=1e-6)
    gap = held_out_rewards.max(axis=1).mean() - held_out_rewards[:, fixed].mean()
    for row in rows:
        each = [seed["reward"] for seed in row["each_seed"]]
        assert len(each) == 2 and row["reward"] == pytest.approx(np.mean(each))
        assert held_out_rewards.min(axis=1).mean() <= row["reward"] <= result["oracle"]["reward"]
        assert row["confidence_interval"][0] <= row["reward"] <= row["confidence_interval"][1]
        assert row["difference"] == pytest.approx(row["reward"] - rows[0]["reward"])
        assert row["share_of_gap"] == pytest.approx(
            (row["reward"] - result["best_fixed"]["reward"]) / gap, abs=1e-5
        )


def test_the_written_page_and_result_are_those_returned(result, options):
    text = (options.out / "ablation.md").read_text()
    assert text == page(result) and json.loads((options.out / "result.json").read_text()) == result
    for row in result["observations"]:
        assert f"| {row['observation']} | {row['width']} | {row['reward']:.4f} (" in text
    assert f"best fixed ({result['best_fixed']['insert_layer']})" in text
    assert ablation.verdict(result) in text


def test_finished_observations_are_not_repeated(result, options, monkeypatch):
    (options.out / "result.json").unlink()
    (options.out / "observations" / "hidden-2.json").unlink()
    computed = []
    stock = Observation.__call__

    def observe(self, backbone, prompts, batch_size=32):
        if len(prompts) > 1:
            computed.append(self.name)
        return stock(self, backbone, prompts, batch_size)

    monkeypatch.setattr(Observation, "__call__", observe)
    assert ablation.run(options) == result
    assert computed == ["hidden:2"]
    before = (options.out / "result.json").stat().st_mtime_ns
    assert ablation.run(options) == result
    assert (options.out / "result.json").stat().st_mtime_ns == before


def test_the_verdict_names_significant_differences(result):
    first, second, third, fourth = result["observations"]

    def verdict_of(*intervals, images=40):
        rows = [
            row | {"difference": sum(interval) / 2, "difference_interval": interval}
            for row, interval in zip((second, third, fourth), intervals, strict=True)
        ]
        return ablation.verdict({"observations": [first, *rows], "images": {"held_out": images}})

    none = verdict_of([-1, 1], [-1, 1], [-1, 1])
    assert none == "No observation earns significantly more than embeddings."
    mixed = verdict_of([0.1, 0.4], [-0.4, -0.1], [-1, 1], images=12)
    assert "1 of 3" in mixed and "hidden:2 earns most (+0.2500 nats)" in mixed
    assert "these earn less: embeddings+image" in mixed and "only 12 held-out images" in mixed


def test_unusable_observations_are_refused(options, tmp_path):
    with pytest.raises(ValueError, match="name each observation once"):
        chosen_observations(replace(options, observation="hidden:2,hidden:2"))
    with pytest.raises(ValueError, match="--observation 'shallow'"):
        ablation.run(replace(options, out=tmp_path / "a", observation="embeddings,shallow"))
    with pytest.raises(ValueError, match="hidden:8 at most"):
        ablation.run(replace(options, out=tmp_path / "b", observation="embeddings,hidden:9"))
    assert not (tmp_path / "b" / "table").exists()
