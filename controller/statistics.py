"""Means and scores with percentile-bootstrap confidence intervals, clustered by image, and McNemar's test.

Questions about one image are not independent, so whole images are drawn, not single prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CHUNK = 4_000_000  # drawn indices held at once: 32 MB


class Interval(NamedTuple):
    """A mean and its confidence interval, in the unit of the values."""

    mean: float
    low: float
    high: float


class McNemar(NamedTuple):
    """Questions that only the first answers right, those that only the second does, and the p-value."""

    first_only: int
    second_only: int
    p_value: float


def mcnemar(a: ArrayLike, b: ArrayLike) -> McNemar:
    """McNemar's exact test, two-sided, of whether a and b (n each, 0 or 1, the same questions) are right
    equally often.

    Where one alone is right, either is as likely to be it under the null hypothesis: the p-value is that of
    a fair coin. Questions are taken as independent; where many share an image, prefer `paired_interval`.

    Raises `ValueError` for lengths that differ and values that are neither 0 nor 1.
    """
    first, second = _paired(a, b, "paired values need equal lengths")
    for name, values in (("a", first), ("b", second)):
        strange = values[(values != 0) & (values != 1)]
        if len(strange):
            raise ValueError(f"{name} holds {strange[0]:g}: McNemar's test takes 0 (wrong) and 1 (right)")
    only = int((first > second).sum()), int((second > first).sum())
    tosses, fewer = sum(only), min(only)
    tail = ways = 1  # of no heads
    for heads in range(1, fewer + 1):
        ways = ways * (tosses - heads + 1) // heads
        tail += ways
    return McNemar(*only, min(1.0, 2 * tail / 2**tosses))


def score_interval(
    score: Callable[[NDArray[np.int64]], float],
    count: int,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    samples: int = 200,
    seed: int = 0,
) -> Interval:
    """`score` of all `count` questions with its percentile-bootstrap interval, clustered as `mean_interval`.

    For scores that are no mean of what each question earns (mAP, BLEU): `score` takes the indices of drawn
    questions, an index as often as it was drawn, and is asked `samples` times; draws of which it says NaN are
    left out. `low` and `high` are NaN where it does so of all.
    """
    _check_interval(confidence, samples)
    if clusters is not None and len(clusters) != count:
        raise ValueError(f"{count} questions but {len(clusters)} clusters: give one for each question")
    groups: dict[Hashable, list[int]] = {}
    for index in range(count):
        groups.setdefault(index if clusters is None else clusters[index], []).append(index)
    members = [np.array(rows) for rows in groups.values()]
    drawn = [row for draws in _draws(len(members), samples, seed) for row in draws]
    scores = np.array([score(np.concatenate([members[cluster] for cluster in row])) for row in drawn])
    scores = scores[~np.isnan(scores)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(scores, [tail, 1 - tail]) if len(scores) else (math.nan, math.nan)
    return Interval(score(np.arange(count)), float(low), float(high))


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
    sums, counts = _by_cluster(_checked(values, "values"), clusters)
    return _interval(sums, counts, confidence, samples, seed)


def paired_interval(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of `a - b` (n each, the same prompts in the same order) with its interval, as `mean_interval`."""
    first, second = _paired(a, b, "paired values need equal lengths")
    return mean_interval(first - second, clusters, confidence, samples, seed)


def ratio_interval(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of `a` divided by mean of `b` (n each, the same prompts), with its interval, as `mean_interval`.

    Both means are taken of the same draws, since they rise and fall together. Draws in which the mean of `b`
    is 0 have no ratio and are left out.

    Raises `ValueError` also where the mean of `b` is 0.
    """
    numerator, denominator = _paired(a, b, "a ratio needs equal lengths")
    if denominator.sum() == 0:
        raise ValueError("the mean of b is 0: there is no ratio")
    return _interval(
        _by_cluster(numerator, clusters)[0], _by_cluster(denominator, clusters)[0], confidence, samples, seed
    )


def _interval(
    above: NDArray[np.float64], below: NDArray[np.float64], confidence: float, samples: int, seed: int
) -> Interval:
    """Sum of `above` over sum of `below` (a value of each cluster), with its percentile interval."""
    _check_interval(confidence, samples)
    ratios = []
    for drawn in _draws(len(above), samples, seed):
        divisors = below[drawn].sum(axis=1)
        defined = divisors != 0
        ratios.append(above[drawn].sum(axis=1)[defined] / divisors[defined])
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    return Interval(float(above.sum() / below.sum()), float(low), float(high))


def _check_interval(confidence: float, samples: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence!r}: give a number between 0 and 1, such as 0.95")
    if samples < 1:
        raise ValueError(f"samples {samples!r}: give at least one bootstrap sample")


def _draws(clusters: int, samples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Indices (rows, clusters) drawn with replacement, `samples` rows in all."""
    rng = np.random.default_rng(seed)
    rows = max(1, CHUNK // clusters)
    for start in range(0, samples, rows):
        yield rng.integers(clusters, size=(min(rows, samples - start), clusters))


def _checked(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} of shape {array.shape}: give a list of at least one number")
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name}[{int(np.argmin(np.isfinite(array)))}] is not finite: leave such values out first"
        )
    return array


def _paired(a: ArrayLike, b: ArrayLike, why: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = _checked(a, "a"), _checked(b, "b")
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values of a and {len(second)} of b: {why}")
    return first, second


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
