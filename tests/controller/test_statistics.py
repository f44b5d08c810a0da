"""The intervals that results are judged by: coverage, pairing, clustering, and what they refuse."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.statistics import mean_interval, paired_interval, ratio_interval


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
    monkeypatch.setattr("controller.statistics.CHUNK", 7 * 500)
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
