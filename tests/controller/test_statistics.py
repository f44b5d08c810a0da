"""The intervals that results are judged by: coverage, pairing, clustering, and what they refuse."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepinsert.controller.statistics import (
    drawn_interval,
    mcnemar,
    mean_interval,
    paired_interval,
    ratio_interval,
    score_draws,
)


def coverage(draw, clusters=None, trials=300):
    """Share of `trials` whose 95 % interval holds the true mean 0."""
    hits = 0
    for trial in range(trials):
        interval = mean_interval(draw(np.random.default_rng(trial)), clusters, samples=400, seed=trial)
        hits += interval.low <= 0 <= interval.high
    return hits / trials


def test_interval_covers_the_true_mean_95_percent_of_the_time():
    assert 0.91 <= coverage(lambda rng: rng.normal(size=80)) <= 0.98


def test_clusters_keep_coverage_where_prompts_of_one_image_agree():
    images = np.repeat(np.arange(40), 8)

    def draw(rng):
        return np.repeat(rng.normal(size=40), 8) + 0.1 * rng.normal(size=320)

    assert 0.90 <= coverage(draw, list(images)) <= 0.98
    assert coverage(draw, None) < 0.7  # what ignoring the images would have claimed


def test_matches_the_standard_error_of_a_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=1000)
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / np.sqrt(1000), rel=0.1)


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(1)
    hard = rng.normal(scale=5, size=200)
    a, b = hard + 0.2 + 0.1 * rng.normal(size=200), hard + 0.1 * rng.normal(size=200)
    mean, low, high = paired_interval(a, b)
    assert low > 0.1 and high < 0.3 and mean == pytest.approx((a - b).mean())
    assert mean_interval(a).low < mean_interval(b).high  # unpaired, the two overlap


def test_large_data_in_chunks_gives_the_same_interval(monkeypatch):
    values = np.random.default_rng(2).normal(size=500)
    whole = mean_interval(values)
    monkeypatch.setattr("deepinsert.controller.statistics.CHUNK", 7 * 500)
    assert mean_interval(values) == whole


def test_one_cluster_gives_a_degenerate_interval():
    assert mean_interval([1.0, 2.0, 3.0], ["bus.png"] * 3) == (2.0, 2.0, 2.0)
    assert mean_interval([4.0]) == (4.0, 4.0, 4.0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(0, 4)), min_size=1, max_size=30))
def test_interval_lies_inside_the_values_and_repeats(rows):
    values, clusters = [v for v, _ in rows], [c for _, c in rows]
    mean, low, high = mean_interval(values, clusters, samples=100)
    slack = 1e-9
    assert min(values) - slack <= low <= high <= max(values) + slack
    assert mean == pytest.approx(np.mean(values), abs=1e-9)
    assert mean_interval(values, clusters, samples=100) == (mean, low, high)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(values=[]), "at least one number"),
        (dict(values=[[1.0], [2.0]]), "at least one number"),
        (dict(values=[1.0, float("nan")]), r"values\[1\] is not finite"),
        (dict(values=[1.0, 2.0], clusters=["a"]), "2 values but 1 clusters"),
        (dict(values=[1.0], confidence=1.0), "confidence 1.0"),
        (dict(values=[1.0], samples=0), "samples 0"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        mean_interval(**arguments)


def test_paired_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="2 values of a and 1 of b"):
        paired_interval([1.0, 2.0], [1.0])


def test_a_ratio_is_drawn_as_one():
    rng = np.random.default_rng(0)
    size = rng.gamma(1.0, 1.0, size=400)
    found = ratio_interval(0.4 * size, size)  # both vary widely, the ratio not at all
    assert found == pytest.approx((0.4, 0.4, 0.4))
    noisy = ratio_interval(0.4 * size + 0.1 * rng.normal(size=400), size)
    assert noisy.low < 0.4 < noisy.high and noisy.high - noisy.low < 0.05


def test_a_ratio_leaves_out_draws_without_a_divisor():
    found = ratio_interval([1.0, 0.0, 0.0], [2.0, 0.0, 0.0], samples=200)
    assert found == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="mean of b is 0"):
        ratio_interval([1.0, 2.0], [0.0, 0.0])
    with pytest.raises(ValueError, match="equal lengths"):
        ratio_interval([1.0, 2.0], [1.0])


def test_a_ratio_s_interval_covers_the_truth_where_clusters_agree():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(150):
        common = np.repeat(rng.normal(size=40), 5)
        below = 1 + 0.3 * np.repeat(rng.normal(size=40), 5)
        above = 0.5 + 0.3 * common + 0.1 * rng.normal(size=200)
        found = ratio_interval(above, below, np.repeat(np.arange(40), 5), samples=400)
        hits += found.low <= 0.5 <= found.high
    assert hits >= 132  # 95 % of 150 is 142.5; 132 and fewer have a chance below 1 %


@pytest.mark.parametrize(
    ("first_only", "second_only", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # one toss: either side is as far out
        (0, 5, 2 / 32),
        (5, 0, 2 / 32),
        (1, 5, 2 * (1 + 6) / 64),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
        (3, 3, 1.0),  # both tails overlap; a p-value is at most 1
        (10, 25, 0.016673),  # scipy.stats.binomtest(10, 35).pvalue
    ],
)
def test_mcnemar_counts_tosses_of_a_fair_coin(first_only, second_only, p_value):
    both, neither = 7, 4
    a = [1] * both + [0] * neither + [1] * first_only + [0] * second_only
    b = [1] * both + [0] * neither + [0] * first_only + [1] * second_only
    found = mcnemar(a, b)
    assert found[:2] == (first_only, second_only)
    assert found.p_value == pytest.approx(p_value, rel=1e-4)


def test_mcnemar_rejects_a_true_null_hypothesis_no_more_than_it_says():
    rng = np.random.default_rng(0)
    p_values = [mcnemar(*(rng.random((2, 60)) < 0.7).astype(float)).p_value for _ in range(1000)]
    assert np.mean(np.array(p_values) <= 0.05) <= 0.06


def test_mcnemar_stays_exact_where_floats_would_overflow():
    assert mcnemar([1.0] * 3000 + [0.0] * 3000, [0.0] * 3000 + [1.0] * 3000).p_value == 1.0
    assert 0 <= mcnemar(np.ones(5000), np.zeros(5000)).p_value < 1e-300


def test_mcnemar_refuses_what_is_no_verdict():
    with pytest.raises(ValueError, match=r"a holds 0\.3"):
        mcnemar([0.3, 1], [1, 1])
    with pytest.raises(ValueError, match="b holds 2"):
        mcnemar([0, 1], [2, 1])
    with pytest.raises(ValueError, match="2 values of a and 1 of b"):
        mcnemar([0, 1], [1])


def test_a_score_s_interval_is_that_of_the_mean_where_the_score_is_one():
    rng = np.random.default_rng(3)
    values, clusters = rng.normal(size=120), list(np.repeat(np.arange(30), 4))
    draws = score_draws(lambda rows: float(values[rows].mean()), 120, clusters, samples=2000)
    assert drawn_interval(values.mean(), draws) == pytest.approx(mean_interval(values, clusters), abs=1e-9)


def test_draws_of_two_models_are_of_the_same_questions():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(2, 60))
    first, second = (score_draws(lambda rows, own=own: float(own[rows].mean()), 60) for own in (a, b))
    found = drawn_interval((a - b).mean(), first - second)
    assert found == pytest.approx(paired_interval(a, b, samples=200), abs=1e-9)


def test_a_score_s_interval_leaves_out_draws_that_have_none():
    def score(rows):
        return float("nan") if 0 in rows else 1.0 * (rows == 1).sum()

    mean, low, high = drawn_interval(1.5, score_draws(score, 3, samples=500))
    assert mean == 1.5 and 0 <= low < high <= 3
    assert np.isnan(drawn_interval(1.5, [float("nan")]).low) and np.isnan(drawn_interval(1.5, []).high)
    assert len(score_draws(score, 3, samples=0)) == 0
    with pytest.raises(ValueError, match="3 questions but 1 clusters"):
        score_draws(score, 3, ["a"])
