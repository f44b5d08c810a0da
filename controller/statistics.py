"""Means with percentile-bootstrap confidence intervals, clustered by image.

Questions about one image are not independent, so whole images are drawn, not single prompts.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CHUNK = 4_000_000  # drawn indices held at once: 32 MB


class Interval(NamedTuple):
    """A mean and its confidence interval, in the unit of the values."""

    mean: float
    low: float
    high: float


def mean_interval(
    values: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of `values` (n) with its percentile-bootstrap interval.

    `clusters` (n) names what each value belongs to, such as its image; clusters are drawn with replacement
    and a draw's mean is that of all its values. None makes every value its own cluster. With one cluster
    there is nothing to draw from: the interval is then the mean itself, and says nothing about uncertainty.

    Raises `ValueError` for no value, a value that is not finite, lengths that differ, or a `confidence`
    outside (0, 1).
    """
    array = _checked(values, "values")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence!r}: give a number between 0 and 1, such as 0.95")
    if samples < 1:
        raise ValueError(f"samples {samples!r}: give at least one bootstrap sample")
    sums, counts = _by_cluster(array, clusters)
    rng = np.random.default_rng(seed)
    means = []
    rows = max(1, CHUNK // len(sums))
    for start in range(0, samples, rows):
        drawn = rng.integers(len(sums), size=(min(rows, samples - start), len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))


def paired_interval(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of `a - b` (n each, the same prompts in the same order) with its interval, as `mean_interval`."""
    first, second = _checked(a, "a"), _checked(b, "b")
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values of a and {len(second)} of b: paired values need equal lengths")
    return mean_interval(first - second, clusters, confidence, samples, seed)


def _checked(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} of shape {array.shape}: give a list of at least one number")
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name}[{int(np.argmin(np.isfinite(array)))}] is not finite: leave such values out first"
        )
    return array


def _by_cluster(
    values: NDArray[np.float64], clusters: Sequence[Hashable] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and count of the values of each cluster, in order of first appearance."""
    if clusters is None:
        return values, np.ones(len(values))
    if len(clusters) != len(values):
        raise ValueError(f"{len(values)} values but {len(clusters)} clusters: give one for each value")
    position: dict[Hashable, int] = {}
    index = np.array([position.setdefault(cluster, len(position)) for cluster in clusters])
    return _sums(index, values), _sums(index, np.ones(len(values)))


def _sums(index: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.bincount(index, weights=values).astype(np.float64)
