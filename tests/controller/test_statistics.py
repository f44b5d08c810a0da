"""Bootstrap intervals and McNemar's test: coverage, pairing, clusters, and the values that they refuse."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepinsert.controller.statistics import (
    ClusterBootstrap,
    bootstrap_scores,
    mcnemar,
    mean_interval,
    paired_interval,
    percentile_interval,
    ratio_interval,
)


def coverage(draw, clusters=None, trials=300):
    """Return the share of `trials` whose 95 % interval contains the true mean 0."""
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
    assert coverage(draw, None) < 0.7  # intervals that ignore the images are too narrow


def test_matches_the_standard_error_of_a_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=1000)
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / np.sqrt(1000), rel=0.1)


def test_pairing_removes_common_variation():
    rng = np.random.default_rng(1)
    hard = rng.normal(scale=5, size=200)
    a, b = hard + 0.2 + 0.1 * rng.normal(size=200), hard + 0.1 * rng.normal(size=200)
    mean, low, high = paired_interval(a, b)
    assert low > 0.1 and high < 0.3 and mean == pytest.approx((a - b).mean())
    assert mean_interval(a).low < mean_interval(b).high  # unpaired, the two overlap


def test_chunks_do_not_change_the_interval(monkeypatch):
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


def test_numerator_and_denominator_of_a_ratio_are_drawn_together():
    rng = np.random.default_rng(0)
    size = rng.gamma(1.0, 1.0, size=400)
    constant = ratio_interval(0.4 * size, size)  # both vary widely, but their ratio is constant
    assert constant == pytest.approx((0.4, 0.4, 0.4))
    noisy = ratio_interval(0.4 * size + 0.1 * rng.normal(size=400), size)
    assert noisy.low < 0.4 < noisy.high and noisy.high - noisy.low < 0.05


def test_a_ratio_leaves_out_draws_without_a_divisor():
    assert ratio_interval([1.0, 0.0, 0.0], [2.0, 0.0, 0.0], samples=200) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="mean of b is 0"):
        ratio_interval([1.0, 2.0], [0.0, 0.0])
    with pytest.raises(ValueError, match="equal lengths"):
        ratio_interval([1.0, 2.0], [1.0])


def test_the_interval_of_a_ratio_covers_the_truth_where_clusters_agree():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(150):
        common = np.repeat(rng.normal(size=40), 5)
        below = 1 + 0.3 * np.repeat(rng.normal(size=40), 5)
        above = 0.5 + 0.3 * common + 0.1 * rng.normal(size=200)
        interval = ratio_interval(above, below, np.repeat(np.arange(40), 5), samples=400)
        hits += interval.low <= 0.5 <= interval.high
    assert hits >= 132  # 142.5 are expected of 150; fewer than 132 have a probability below 1 %


@pytest.mark.parametrize(
    ("first_only", "second_only", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # of one toss, both outcomes are equally extreme
        (0, 5, 2 / 32),
        (5, 0, 2 / 32),
        (1, 5, 2 * (1 + 6) / 64),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
        (3, 3, 1.0),  # both tails overlap, and a p-value is at most 1
        (10, 25, 0.01667384780012071),
    ],
)
def test_mcnemar_counts_tosses_of_a_fair_coin(first_only, second_only, p_value):
    both, neither = 7, 4
    a = [1] * both + [0] * neither + [1] * first_only + [0] * second_only
    b = [1] * both + [0] * neither + [0] * first_only + [1] * second_only
    test = mcnemar(a, b)
    assert test[:2] == (first_only, second_only)
    assert test.p_value == pytest.approx(p_value, abs=1e-12)


def binomial_tail(first_only, second_only):
    """Return the exact p-value from whole numbers."""
    tosses = first_only + second_only
    ways = sum(math.comb(tosses, heads) for heads in range(min(first_only, second_only) + 1))
    return min(1.0, 2 * ways / 2**tosses)


@pytest.mark.parametrize("second_only", [3, 20, 400])
def test_mcnemar_equals_the_sum_of_binomial_coefficients(second_only):
    for first_only in range(0, 500, 37):
        a = [1] * first_only + [0] * second_only
        p_value = mcnemar(a, 1 - np.array(a)).p_value
        assert p_value == pytest.approx(binomial_tail(first_only, second_only), abs=1e-12)


def test_mcnemar_rejects_a_true_null_hypothesis_at_most_at_its_level():
    rng = np.random.default_rng(0)
    p_values = [mcnemar(*(rng.random((2, 60)) < 0.7).astype(float)).p_value for _ in range(1000)]
    assert np.mean(np.array(p_values) <= 0.05) <= 0.06


def test_mcnemar_takes_thousands_of_questions():
    assert mcnemar([1.0] * 3000 + [0.0] * 3000, [0.0] * 3000 + [1.0] * 3000).p_value == 1.0
    assert 0 <= mcnemar(np.ones(5000), np.zeros(5000)).p_value < 1e-300


def test_mcnemar_refuses_values_other_than_0_and_1():
    with pytest.raises(ValueError, match=r"a holds 0\.3"):
        mcnemar([0.3, 1], [1, 1])
    with pytest.raises(ValueError, match="b holds 2"):
        mcnemar([0, 1], [2, 1])
    with pytest.raises(ValueError, match="2 values of a and 1 of b"):
        mcnemar([0, 1], [1])


def test_the_interval_of_a_score_that_is_a_mean_is_that_of_the_mean():
    rng = np.random.default_rng(3)
    values, clusters = rng.normal(size=120), list(np.repeat(np.arange(30), 4))
    draws = bootstrap_scores(lambda rows: float(values[rows].mean()), 120, clusters, samples=2000)
    assert percentile_interval(values.mean(), draws) == pytest.approx(
        mean_interval(values, clusters), abs=1e-9
    )


def test_the_samples_of_two_models_hold_the_same_questions():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(2, 60))
    first, second = (
        bootstrap_scores(lambda rows, values=values: float(values[rows].mean()), 60) for values in (a, b)
    )
    interval = percentile_interval((a - b).mean(), first - second)
    assert interval == pytest.approx(paired_interval(a, b, samples=200), abs=1e-9)


def test_the_interval_of_a_score_leaves_out_samples_without_a_score():
    def score(rows):
        return float("nan") if 0 in rows else 1.0 * (rows == 1).sum()

    mean, low, high = percentile_interval(1.5, bootstrap_scores(score, 3, samples=500))
    assert mean == 1.5 and 0 <= low < high <= 3
    assert np.isnan(percentile_interval(1.5, [float("nan")]).low) and np.isnan(
        percentile_interval(1.5, []).high
    )
    assert len(bootstrap_scores(score, 3, samples=0)) == 0
    with pytest.raises(ValueError, match="3 questions but 1 clusters"):
        bootstrap_scores(score, 3, ["a"])


IMAGES = ["a", "b", "a", "c", "a"]


def test_counts_rows_and_positions_describe_the_same_samples():
    bootstrap = ClusterBootstrap(IMAGES, samples=40, seed=3)
    positions, counts = (
        np.concatenate(list(chunks)) for chunks in (bootstrap.positions(), bootstrap.counts())
    )
    assert positions.shape == counts.shape == (40, 3) and bootstrap.sizes.tolist() == [3, 1, 1]
    members = {0: [0, 2, 4], 1: [1], 2: [3]}
    for drawn, count, rows in zip(positions, counts, bootstrap.rows(), strict=True):
        assert np.bincount(drawn, minlength=3).tolist() == count.tolist()
        assert rows.tolist() == [row for cluster in drawn for row in members[cluster]]


def test_means_of_samples_are_over_all_rows_of_their_clusters():
    values = np.random.default_rng(5).normal(size=(5, 4))
    bootstrap = ClusterBootstrap(IMAGES, samples=40)
    means = [values[rows].mean(axis=0) for rows in bootstrap.rows()]
    np.testing.assert_allclose(bootstrap.means(values), means, rtol=1e-12)
    np.testing.assert_allclose(bootstrap.ratios(values[:, 0]), np.array(means)[:, 0], rtol=1e-12)


def test_chunks_do_not_change_the_means(monkeypatch):
    values, images = np.random.default_rng(6).normal(size=(150, 8)), list(np.repeat(np.arange(50), 3))
    whole = ClusterBootstrap(images, 100, seed=5).means(values)
    monkeypatch.setattr("deepinsert.controller.statistics.CHUNK", 50 * 7)
    np.testing.assert_allclose(ClusterBootstrap(images, 100, seed=5).means(values), whole, rtol=1e-12)


def test_both_kinds_of_draws_have_the_same_distribution():
    bootstrap = ClusterBootstrap(range(4), samples=20_000)
    counts = np.concatenate(list(bootstrap.counts()))
    multinomial = bootstrap.multinomial_counts()
    assert counts.shape == multinomial.shape and (multinomial.sum(axis=1) == 4).all()
    for count in range(5):
        assert (counts == count).mean() == pytest.approx((multinomial == count).mean(), abs=0.01)


def test_the_samples_of_a_seed_are_those_of_published_figures():
    """A change of these draws would change every published interval."""
    bootstrap = ClusterBootstrap(range(4), samples=2, seed=0)
    assert next(bootstrap.positions()).tolist() == [[3, 2, 2, 1], [1, 0, 0, 0]]
    assert bootstrap.multinomial_counts().tolist() == [[1, 0, 0, 3], [0, 2, 2, 0]]
