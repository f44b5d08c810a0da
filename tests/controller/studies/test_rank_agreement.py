"""Rank correlations equal their definitions, samples draw whole images, and a choice has its regret."""

import itertools

import numpy as np
import pytest

from deepinsert.controller.studies.rank_agreement import (
    DataAndSamples,
    choice,
    correlations,
    kendall,
    spearman,
)


def tau_b(a: np.ndarray, b: np.ndarray) -> float:
    """Return Kendall's tau-b from the signs of all pairs."""
    pairs = list(itertools.combinations(range(len(a)), 2))
    signs = np.array([[np.sign(a[i] - a[j]), np.sign(b[i] - b[j])] for i, j in pairs])
    return float(signs.prod(axis=1).sum() / np.sqrt(np.abs(signs).sum(axis=0).prod()))


def rho(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's correlation: Pearson's correlation of ranks, ties sharing their mean rank."""
    ranks = [[(values < one).sum() + ((values == one).sum() + 1) / 2 for one in values] for values in (a, b)]
    return float(np.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_equal_their_definitions(ties: bool) -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 50, 6))
    if ties:
        a, b = np.round(a), np.round(b)
    for measure, definition in ((spearman, rho), (kendall, tau_b)):
        expected = [definition(first, second) for first, second in zip(a, b, strict=True)]
        np.testing.assert_allclose(measure(a, b), expected, atol=1e-12)


def test_correlations_of_small_rankings() -> None:
    layers = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [5.0, 4.0, 4.0]])
    others = np.array([[7.0, 8.0, 9.0], [3.0, 1.0, 2.0], [0.0, 1.0, 1.0]])
    assert spearman(layers, others) == pytest.approx([1, -0.5, -1], abs=1e-12)
    assert kendall(layers, others) == pytest.approx([1, -1 / 3, -1], abs=1e-12)


def test_equal_values_have_no_rank_correlation() -> None:
    flat, rising = np.ones((1, 4)), np.arange(4.0)[None]
    assert np.isnan(spearman(flat, rising)).all() and np.isnan(kendall(rising, flat)).all()
    figures = correlations(np.ones((5, 3)), np.arange(15).reshape(5, 3))
    assert np.isnan(figures["spearman"]) and figures["kendall_interval"] == [None, None]


def test_a_sample_takes_whole_images() -> None:
    images = ["a", "b", "a", "c"]
    values = np.array([[1.0, 0.0], [10.0, 1.0], [3.0, 0.0], [100.0, 5.0]])
    means = DataAndSamples(images, samples=3000).means(values)
    np.testing.assert_allclose(means[0], values.mean(axis=0))
    # Three images have 27 equally likely draws, each a mean over the questions of its images.
    sums, sizes = {"a": 4.0, "b": 10.0, "c": 100.0}, {"a": 2, "b": 1, "c": 1}
    expected = [
        sum(sums[image] for image in draw) / sum(sizes[image] for image in draw)
        for draw in itertools.product("abc", repeat=3)
    ]
    assert {round(value, 9) for value in means[1:, 0]} == {round(value, 9) for value in expected}
    assert means[1:, 0].mean() == pytest.approx(np.mean(expected), abs=4 * np.std(expected) / np.sqrt(3000))
    np.testing.assert_array_equal(means, DataAndSamples(images, samples=3000).means(values))


def test_regret_is_the_loss_of_the_chosen_layer() -> None:
    predicted = np.array([[0.0, 1.0, 0.5], [0.0, 1.0, 0.5], [9.0, 1.0, 0.5]])
    truth = np.array([[0.2, 0.3, 0.7], [0.2, 0.9, 0.7], [0.2, 0.3, 0.7]])
    figures = choice(predicted, truth)
    assert (figures["picked"], figures["best"]) == (1, 2)
    assert figures["regret"] == pytest.approx(0.4)
    assert figures["regret_interval"] == pytest.approx([0.0125, 0.4875])
    assert figures["agreement"] == 0.5
