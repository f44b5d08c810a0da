"""Whether one figure ranks insert layers as another does: rank correlations, and the regret of a choice.

Figures are arrays (1 + samples, K) of K layers: the first row holds the means of the data, the others those
of bootstrap samples that draw whole images. `DataAndSamples` computes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from deepinsert.controller.statistics import ClusterBootstrap, percentile_interval

FloatArray = NDArray[np.float64]


def spearman(a: ArrayLike, b: ArrayLike) -> FloatArray:
    """Return Spearman's rank correlation of `a` and `b` (R, K) per row.

    Ties share their mean rank. The correlation is NaN where all values of one row are equal.
    """
    return _per_row(lambda first, second: float(stats.spearmanr(first, second).statistic), a, b)


def kendall(a: ArrayLike, b: ArrayLike) -> FloatArray:
    """Return Kendall's tau-b of `a` and `b` (R, K) per row; NaN where all values of one row are equal."""
    return _per_row(lambda first, second: float(stats.kendalltau(first, second).statistic), a, b)


def _per_row(measure: Callable[[FloatArray, FloatArray], float], a: ArrayLike, b: ArrayLike) -> FloatArray:
    """Return a rank correlation (R) of `a` and `b` (R, K), computed once per different pair of rankings.

    Thousands of bootstrap samples have few different rankings of the layers.
    """
    ranks = np.stack([stats.rankdata(values, axis=-1) for values in (a, b)], axis=1)
    pairs, pair_of_row = np.unique(ranks, axis=0, return_inverse=True)
    correlations = [
        math.nan if np.ptp(first) == 0 or np.ptp(second) == 0 else measure(first, second)
        for first, second in pairs
    ]
    return np.array(correlations)[pair_of_row.ravel()]


class DataAndSamples:
    """Means over prompts for the data itself and for the same bootstrap samples in every figure.

    Args:
        images: the image of each prompt (P), the clusters of the bootstrap.
        samples: the number of bootstrap samples.
        seed: the seed of the draws.
    """

    def __init__(self, images: Sequence[Hashable], samples: int = 2000, seed: int = 0) -> None:
        self.bootstrap = ClusterBootstrap(images, samples, seed)
        data = np.ones((1, self.bootstrap.num_clusters))
        self.weights = np.concatenate([data, self.bootstrap.multinomial_counts()])

    def means(self, values: FloatArray) -> FloatArray:
        """Return the means (1 + samples, K) of `values` (P, K): of the data, then of each sample."""
        return self.bootstrap.weighted_means(values, self.weights)


def interval(draws: FloatArray) -> list[float | None]:
    """Return the 95 % percentile interval of draws (samples) without NaN; two None if all are NaN."""
    _, low, high = percentile_interval(math.nan, draws)
    return [None, None] if math.isnan(low) else [low, high]


def correlations(predictor: FloatArray, truth: FloatArray) -> dict[str, Any]:
    """Return Spearman's and Kendall's correlation of two figures (1 + samples, K), with intervals."""
    figures: dict[str, Any] = {}
    for name, measure in (("spearman", spearman), ("kendall", kendall)):
        values = measure(predictor, truth)
        figures[name] = float(values[0])
        figures[f"{name}_interval"] = interval(values[1:])
    return figures


def choice(predicted: FloatArray, truth: FloatArray) -> dict[str, Any]:
    """Return what choosing the layer of the highest `predicted` reward loses in `truth`.

    Both are rewards (1 + samples, K). The result holds the columns `picked` and `best`, the regret against
    the best layer in the unit of `truth` with its interval, and the share of samples in which both agree.
    """
    chosen_column, best_column = predicted.argmax(axis=1), truth.argmax(axis=1)
    rows = np.arange(len(truth))
    regret = truth[rows, best_column] - truth[rows, chosen_column]
    return {
        "picked": int(chosen_column[0]),
        "best": int(best_column[0]),
        "regret": float(regret[0]),
        "regret_interval": interval(regret[1:]),
        "agreement": float((chosen_column[1:] == best_column[1:]).mean()),
    }
