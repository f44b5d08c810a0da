"""Each baseline on data made for it, and the comparison of policies with baselines."""

import numpy as np
import pytest

from deepinsert.controller.policy.baselines import (
    baseline_columns,
    compare_with_baselines,
    gate_columns,
    nearest_neighbour_columns,
    ridge_columns,
)

PROMPTS, LAYERS = 300, 5


@pytest.fixture
def observations():
    return np.random.default_rng(0).normal(size=(PROMPTS, 6))


def test_ridge_finds_what_is_linear(observations):
    weights = np.random.default_rng(1).normal(size=(6, LAYERS))
    noise = np.random.default_rng(2).normal(size=(PROMPTS, 1))  # difficulty, which no choice changes
    rewards = observations @ weights + 3 * noise
    chosen = ridge_columns(observations[:200], rewards[:200], observations[200:])
    assert (chosen == rewards[200:].argmax(axis=1)).mean() > 0.97
    assert ridge_columns(observations, np.zeros((PROMPTS, 1)), observations[:3]).tolist() == [0, 0, 0]


def test_ridge_falls_back_to_the_best_fixed_layer_where_observations_are_noise(observations):
    rewards = np.random.default_rng(3).normal(size=(PROMPTS, LAYERS)) + np.array([0, 0, 1, 0, 0])
    assert (ridge_columns(observations[:200], rewards[:200], observations[200:]) == 2).mean() > 0.9


def test_neighbours_find_what_is_local(observations):
    kind = (np.linalg.norm(observations[:, :2], axis=1) > 1.2).astype(int)
    rewards = np.eye(LAYERS)[kind * 3]
    near = observations * [1, 1, 0, 0, 0, 0]
    chosen = nearest_neighbour_columns(near[:200], rewards[:200], near[200:])
    assert (chosen == kind[200:] * 3).mean() > 0.8
    assert len(nearest_neighbour_columns(near[:2], rewards[:2], near[200:])) == 100  # fewer than 15 there


def test_the_gate_learns_the_deepest_layer_within_three_per_cent(observations):
    deepest = np.where(observations[:, 0] > 0, 3, 1)
    losses = np.where(np.arange(LAYERS) > deepest[:, None], 1.031, 1.029) * np.full((PROMPTS, 1), 0.8)
    losses[:, 0] = 0.8
    chosen = gate_columns(observations[:200], losses[:200], observations[200:])
    assert (chosen == deepest[200:]).mean() > 0.85
    # A good layer behind a bad one counts, and a single class needs no classifier.
    losses = np.array([[1.0, 2.0, 1.03, 1.04, 9.0]] * 4)
    assert gate_columns(observations[:4], losses, observations[:3]).tolist() == [2, 2, 2]


def compare(rewards, chosen, images=None, train=None):
    simple = baseline_columns(
        np.zeros((4, 1)), np.zeros((4, 3)), np.ones((4, 3)), np.zeros((len(rewards), 1))
    )
    train = rewards if train is None else train
    return compare_with_baselines(
        chosen, simple, train, rewards, (0, 2, 4), images or list(range(len(rewards)))
    )


def test_shares_and_regrets_are_those_of_the_rewards():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(200, 3)) + np.array([0.2, 0, 0])
    best, fixed = rewards.argmax(axis=1), np.zeros(200, dtype=np.int64)
    half = np.where(np.arange(200) % 2 == 0, best, 0)
    comparison = compare(rewards, {7: half, 8: best, 9: fixed}, images=[index // 4 for index in range(200)])
    gap = (rewards.max(axis=1) - rewards[:, 0]).mean()
    gained = (rewards[np.arange(200), half] - rewards[:, 0]).mean()
    policy = comparison["reward"]["policy"]
    assert policy["share_of_gap"] == comparison["share_of_gap"] == pytest.approx(gained / gap)
    assert policy["regret"] == pytest.approx(gap - gained)
    low, high = policy["share_of_gap_interval"]
    assert 0.3 < low < policy["share_of_gap"] < high < 0.7
    assert [row["seed"] for row in comparison["seeds"]["each"]] == [7, 8, 9]
    shares = [row["share_of_gap"] for row in comparison["seeds"]["each"]]
    assert shares == pytest.approx([gained / gap, 1, 0])
    assert comparison["seeds"]["pooled"]["share_of_gap"] == pytest.approx(np.mean(shares))
    assert comparison["reward"]["oracle"]["regret_interval"] == [0, 0]
    assert comparison["reward"]["best_fixed"]["insert_layer"] == 0
    difference = comparison["difference"]["policy_minus_layer_0"]["reward"]
    assert difference == pytest.approx(gained)


def test_without_a_gap_there_is_no_share_and_the_verdict_says_so():
    rewards = np.tile([0.0, 1.0, 0.5], (60, 1)) + np.random.default_rng(0).normal(size=(60, 1))
    comparison = compare(rewards, {0: np.full(60, 1)})
    assert comparison["share_of_gap"] is None and comparison["share_of_gap_interval"] is None
    assert "for every held-out prompt" in comparison["verdict"]
    assert "not even an oracle would earn more than the fixed layer" in comparison["verdict"]
    worse = compare(rewards, {0: np.zeros(60, dtype=np.int64)})
    assert "use the fixed layer" in worse["verdict"] and worse["share_of_gap"] is None
