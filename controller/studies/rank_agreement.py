"""Whether one figure ranks insert layers as another does: rank correlations, what picking by it loses.

Intervals come from a bootstrap over images, whose questions are drawn together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
Correlation = Callable[[ArrayLike, ArrayLike], FloatArray]

CONFIDENCE = 0.95


def spearman(a: ArrayLike, b: ArrayLike) -> FloatArray:
    """Spearman's rank correlation of `a` and `b` (..., K) along the last axis, equal values sharing their
    mean rank; NaN where all values of one are equal."""
    first, second = (ranks - ranks.mean(axis=-1, keepdims=True) for ranks in (ranked(a), ranked(b)))
    size = np.sqrt((first**2).sum(axis=-1) * (second**2).sum(axis=-1))
    return _ratio((first * second).sum(axis=-1), size)


def kendall(a: ArrayLike, b: ArrayLike) -> FloatArray:
    """Kendall's tau-b of `a` and `b` (..., K) along the last axis; NaN where all values of one are equal."""
    first, second = (np.sign(_differences(values)) for values in (a, b))
    size = np.sqrt(np.abs(first).sum(axis=(-2, -1)) * np.abs(second).sum(axis=(-2, -1)))
    return _ratio((first * second).sum(axis=(-2, -1)), size)


def ranked(values: ArrayLike) -> FloatArray:
    """Ranks from 1 along the last axis; equal values share the mean of theirs."""
    signs = np.sign(_differences(values))
    return 0.5 * (signs.sum(axis=-1) + signs.shape[-1] + 1)


def _differences(values: ArrayLike) -> FloatArray:
    """Each value minus each other, (..., K, K)."""
    array = np.asarray(values, dtype=np.float64)
    return array[..., :, None] - array[..., None, :]


def _ratio(above: FloatArray, below: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below > 0, above / below, np.nan)


class Bootstrap:
    """The same draws of images for every figure, so that figures can be set against each other.

    `clusters` (P) name each prompt's image.
    """

    def __init__(self, clusters: Sequence[Hashable], samples: int = 2000, seed: int = 0) -> None:
        position: dict[Hashable, int] = {}
        self.index = np.array([position.setdefault(cluster, len(position)) for cluster in clusters])
        counts = np.bincount(self.index).astype(np.float64)
        drawn = np.random.default_rng(seed).multinomial(
            len(counts), np.full(len(counts), 1 / len(counts)), samples
        )
        # The first row is the data as it is.
        self.weights = np.concatenate([np.ones((1, len(counts))), drawn])
        self.sizes = self.weights @ counts

    def means(self, values: FloatArray) -> FloatArray:
        """Means (1 + samples, K) over the prompts of `values` (P, K): of the data, then of each draw."""
        sums = np.zeros((self.weights.shape[1], values.shape[1]))
        np.add.at(sums, self.index, values)
        return self.weights @ sums / self.sizes[:, None]


def interval(values: FloatArray) -> list[float | None]:
    """The 95 % percentile interval of draws (samples); those without a value are left out."""
    known = values[~np.isnan(values)]
    if not len(known):
        return [None, None]
    tail = (1 - CONFIDENCE) / 2
    return [float(bound) for bound in np.quantile(known, [tail, 1 - tail])]


def correlations(predictor: FloatArray, truth: FloatArray) -> dict[str, Any]:
    """Spearman's and Kendall's correlation of two figures by layer, (1 + samples, K) each as
    `Bootstrap.means` gives them, with intervals."""
    found: dict[str, Any] = {}
    for name, measure in (("spearman", spearman), ("kendall", kendall)):
        values = measure(predictor, truth)
        found[name] = float(values[0])
        found[f"{name}_interval"] = interval(values[1:])
    return found


def choice(predicted: FloatArray, truth: FloatArray) -> dict[str, Any]:
    """What picking the layer of the highest `predicted` reward loses in `truth` against its best layer.

    Both are rewards by layer, (1 + samples, K). Gives columns, the regret in the unit of `truth`, and how
    often the draws agree on the best layer.
    """
    picked, best = predicted.argmax(axis=1), truth.argmax(axis=1)
    rows = np.arange(len(truth))
    regret = truth[rows, best] - truth[rows, picked]
    return {
        "picked": int(picked[0]),
        "best": int(best[0]),
        "regret": float(regret[0]),
        "regret_interval": interval(regret[1:]),
        "agreement": float((picked[1:] == best[1:]).mean()),
    }
