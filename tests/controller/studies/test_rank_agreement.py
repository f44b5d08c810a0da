"""Rank correlations are scipy's, and draws of images are a bootstrap of means over all their questions."""

import numpy as np
import pytest
from scipy import stats

from deepinsert.controller.studies.rank_agreement import Bootstrap, choice, correlations, kendall, spearman


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_those_of_scipy(ties: bool) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50, 6))
    if ties:
        a, b = np.round(a), np.round(b)
    for measure, reference in ((spearman, stats.spearmanr), (kendall, stats.kendalltau)):
        expected = [reference(one, other).statistic for one, other in zip(a, b, strict=True)]
        np.testing.assert_allclose(measure(a, b), expected, atol=1e-12)


def test_equal_values_have_no_rank_correlation() -> None:
    flat = np.ones(4)
    assert np.isnan(spearman(flat, np.arange(4))) and np.isnan(kendall(np.arange(4), flat))
    found = correlations(np.ones((5, 3)), np.arange(15).reshape(5, 3))
    assert np.isnan(found["spearman"]) and found["kendall_interval"] == [None, None]


def test_a_draw_takes_whole_images() -> None:
    images = ["a", "b", "a", "c"]
    values = np.array([[1.0, 0.0], [10.0, 1.0], [3.0, 0.0], [100.0, 5.0]])
    bootstrap = Bootstrap(images, samples=3000)
    means = bootstrap.means(values)
    np.testing.assert_allclose(means[0], values.mean(axis=0))
    # Nine equally likely pairs of two questions of "a", one of "b" or "c" would be for two images; with three
    # images there are 27 draws, each a mean over the questions of its images.
    sums, sizes = {"a": 4.0, "b": 10.0, "c": 100.0}, {"a": 2, "b": 1, "c": 1}
    every = [
        sum(sums[image] for image in drawn) / sum(sizes[image] for image in drawn)
        for drawn in np.array(np.meshgrid(*[list("abc")] * 3)).T.reshape(-1, 3)
    ]
    assert {round(value, 9) for value in means[1:, 0]} == {round(value, 9) for value in every}
    assert means[1:, 0].mean() == pytest.approx(np.mean(every), abs=4 * np.std(every) / np.sqrt(3000))
    np.testing.assert_array_equal(means, Bootstrap(images, samples=3000).means(values))


def test_regret_is_what_the_pick_loses() -> None:
    predicted = np.array([[0.0, 1.0, 0.5], [0.0, 1.0, 0.5], [9.0, 1.0, 0.5]])
    truth = np.array([[0.2, 0.3, 0.7], [0.2, 0.9, 0.7], [0.2, 0.3, 0.7]])
    found = choice(predicted, truth)
    assert (found["picked"], found["best"]) == (1, 2)
    assert found["regret"] == pytest.approx(0.4)
    assert found["regret_interval"] == pytest.approx([0.0125, 0.4875])
    assert found["agreement"] == 0.5
