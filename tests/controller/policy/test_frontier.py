"""A policy's frontier, and whether budgets are met on prompts outside its training."""

import dataclasses
import itertools

import numpy as np
import pytest

from deepinsert.controller.policy.layer_policy import LayerPolicy
from deepinsert.controller.policy.outcomes import FrontierPoint
from deepinsert.envs.rewards.table import RewardTable
from deepinsert.envs.skip_weights import SkipWeights


@pytest.fixture(scope="module")
def unseen(make_graded_table):
    """Table and observations of prompts outside training and frontier."""
    return make_graded_table(2)


def reached(policy, table, observations, weight):
    """Mean FLOPs ratio and mean loss above insert layer 0's at one skip weight."""
    rows, columns = np.arange(len(table)), policy.columns(observations, weight)
    loss = (table.losses[rows, columns] - table.losses[:, 0]).mean()
    return table.flops_ratio[rows, columns].mean(), loss


def test_frontier_is_what_the_table_says(graded_policy, unseen):
    table, observations = unseen
    points = graded_policy.measure_frontier(table, observations)
    assert len(points) == 13
    assert points[0].skip_weight == 0 and points[-1].skip_weight == 1
    assert sorted(point.skip_weight for point in points) == [point.skip_weight for point in points]
    for point in points:
        ratio, increase = reached(graded_policy, table, observations, point.skip_weight)
        assert point.flops_ratio == pytest.approx(ratio) and point.loss_increase == pytest.approx(increase)
        assert point.loss == pytest.approx(table.losses[:, 0].mean() + increase)
        bonus = graded_policy.act(observations, point.skip_weight).mean() / 8
        assert point.reward == pytest.approx(-point.loss + point.skip_weight * bonus)


def test_a_larger_skip_weight_skips_more(graded_policy):
    points = graded_policy.training.frontier
    assert points[0].flops_ratio > 0.85 and points[-1].flops_ratio < 0.4
    ratios = [point.flops_ratio for point in points]
    assert all(later <= earlier + 0.01 for earlier, later in itertools.pairwise(ratios))


@pytest.mark.parametrize("budget", [0.9, 0.75, 0.6, 0.5])
def test_a_compute_budget_is_kept_on_unseen_prompts(graded_policy, unseen, budget):
    weight = graded_policy.resolve_skip_weight(flops_ratio=budget)
    ratio, increase = reached(graded_policy, *unseen, weight)
    assert ratio <= budget + 0.02
    points = graded_policy.training.frontier
    assert weight == min(point.skip_weight for point in points if point.flops_ratio <= budget)
    # No fixed layer that saves as much loses less.
    table = unseen[0]
    fixed = [
        (table.losses[:, column] - table.losses[:, 0]).mean()
        for column in range(8)
        if table.flops_ratio[0, column] <= ratio + 1e-9
    ]
    assert increase <= min(fixed) + 1e-9


@pytest.mark.parametrize("tolerated", [0.01, 0.02, 0.05, 0.1])
def test_a_tolerated_loss_is_kept_on_unseen_prompts(graded_policy, unseen, tolerated):
    weight = graded_policy.resolve_skip_weight(max_loss_increase=tolerated)
    ratio, increase = reached(graded_policy, *unseen, weight)
    assert increase <= tolerated + 0.005 and ratio < 1
    points = graded_policy.training.frontier
    assert weight == max(point.skip_weight for point in points if point.loss_increase <= tolerated)


def test_without_a_wish_the_policys_own_skip_weight_is_used(graded_policy):
    assert graded_policy.resolve_skip_weight() == graded_policy.skip_weight == 1.0
    assert graded_policy.resolve_skip_weight(0.25) == 0.25


def point(weight, increase, ratio):
    return FrontierPoint(weight, 1.0 + (increase or 0), increase, ratio, 0.0)


def with_points(policy, *points, **changes):
    training = dataclasses.replace(policy.training, frontier=points)
    return dataclasses.replace(policy, training=training, **changes)


@pytest.mark.parametrize(
    ("wish", "value", "message"),
    [
        ("skip_weight", 1.5, r"skip_weight 1\.5 is outside 0 to 1"),
        ("skip_weight", float("nan"), "outside 0 to 1"),
        ("flops_ratio", 0.3, r"flops_ratio 0\.3: the least this policy reaches is 0\.4000, at skip weight 1"),
        ("flops_ratio", 0.0, r"flops_ratio 0\.0: give a ratio above 0"),
        ("flops_ratio", 1.5, "at most 1"),
        ("flops_ratio", float("nan"), "give a ratio"),
        (
            "max_loss_increase",
            0.001,
            r"max_loss_increase 0\.001: the least .* is 0\.0100 nats, at .* weight 0",
        ),
        ("max_loss_increase", -0.1, "at least 0"),
        ("max_loss_increase", float("inf"), "at least 0"),
    ],
)
def test_a_wish_that_cannot_be_met_names_what_can(graded_policy, wish, value, message):
    policy = with_points(graded_policy, point(0.0, 0.01, 0.9), point(0.5, 0.05, 0.6), point(1.0, 0.1, 0.4))
    with pytest.raises(ValueError, match=message):
        policy.resolve_skip_weight(**{wish: value})


def test_wishes_exclude_each_other(graded_policy):
    with pytest.raises(ValueError, match="skip_weight and flops_ratio exclude each other"):
        graded_policy.resolve_skip_weight(skip_weight=0.5, flops_ratio=0.5)


def test_a_dip_in_the_curve_is_used_as_it_is(graded_policy):
    policy = with_points(
        graded_policy,
        point(0.0, 0.0, 1.0),
        point(0.4, 0.05, 0.6),
        point(0.5, 0.03, 0.7),
        point(1.0, 0.2, 0.5),
    )
    assert policy.resolve_skip_weight(flops_ratio=0.65) == 0.4
    assert policy.resolve_skip_weight(max_loss_increase=0.04) == 0.5


def test_a_budget_needs_a_policy_over_a_range_that_was_measured(graded_policy):
    single = dataclasses.replace(graded_policy, skip_weights=SkipWeights(0.5, 0.5), skip_weight=0.5)
    for wish in ({"flops_ratio": 0.75}, {"max_loss_increase": 0.02}):
        with pytest.raises(ValueError, match=r"skip weight 0\.5 alone; train one over a range"):
            single.resolve_skip_weight(**wish)
        with pytest.raises(ValueError, match="not measured"):
            with_points(graded_policy).resolve_skip_weight(**wish)
    with pytest.raises(ValueError, match="without FLOPs"):
        with_points(graded_policy, point(0.5, 0.1, None)).resolve_skip_weight(flops_ratio=0.75)
    with pytest.raises(ValueError, match="insert layer 0 is no candidate"):
        with_points(graded_policy, point(0.5, None, 0.5)).resolve_skip_weight(max_loss_increase=0.02)


def test_survives_saving(graded_policy, tmp_path):
    graded_policy.save(tmp_path)
    loaded = LayerPolicy.load(tmp_path)
    assert loaded.training == graded_policy.training
    assert loaded.resolve_skip_weight(flops_ratio=0.75) == graded_policy.resolve_skip_weight(flops_ratio=0.75)


def test_a_table_without_flops_or_layer_0_leaves_them_out(graded_policy, unseen):
    table, observations = unseen
    blind = RewardTable.from_losses(table.losses, range(8), 8)
    assert {point.flops_ratio for point in graded_policy.measure_frontier(blind, observations)} == {None}
    assert graded_policy.pareto_curves(blind, observations) is None
    deeper = RewardTable.from_losses(table.losses[:, 1:], range(1, 8), 8)
    with pytest.raises(
        ValueError, match=r"the table holds insert layers \[1, 2.*the policy chooses among \[0"
    ):
        graded_policy.measure_frontier(deeper, observations)


def test_pareto_holds_policy_fixed_layers_and_oracle(graded_policy, unseen):
    table, observations = unseen
    table.record_correct(*np.indices(table.losses.shape), table.losses < 1.0)
    curves = graded_policy.pareto_curves(table, observations)
    assert curves["prompts"] == 600
    assert [item["insert_layer"] for item in curves["fixed"]] == list(range(8))
    for column, item in enumerate(curves["fixed"]):
        assert item["loss"] == pytest.approx(table.losses[:, column].mean())
        assert item["flops_ratio"] == pytest.approx(table.flops_ratio[:, column].mean())
        assert item["accuracy"] == pytest.approx((table.losses[:, column] < 1.0).mean())
    frontier = graded_policy.measure_frontier(table, observations)
    for item, expected in zip(curves["policy"], frontier, strict=True):
        assert {name: item[name] for name in dataclasses.asdict(expected)} == dataclasses.asdict(expected)
    for item in curves["oracle"]:
        best = table.rewards(item["skip_weight"]).max(axis=1).mean()
        assert item["reward"] == pytest.approx(best)
    for item in curves["policy"]:
        above = [other["reward"] for other in curves["oracle"] if other["skip_weight"] >= item["skip_weight"]]
        assert item["reward"] <= max(above) + 1e-9
