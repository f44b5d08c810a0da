"""The cluster bootstrap, percentile intervals of means, ratios and scores, and McNemar's test.

Questions about one image are not independent, so the bootstrap draws whole images (clusters), not single
prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

CHUNK = 4_000_000
"""Drawn cluster positions in memory at once: 32 MB."""

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class Interval(NamedTuple):
    """A mean and its confidence interval, in the unit of the values."""

    mean: float
    low: float
    high: float


class McNemar(NamedTuple):
    """The numbers of questions that only one of two models answers right, and the p-value of the test."""

    first_only: int
    second_only: int
    p_value: float


class ClusterBootstrap:
    """Bootstrap samples of P rows, drawn by whole clusters with replacement.

    A sample has as many clusters as the data, C. Equal arguments draw the same samples, so that the figures
    of two models can be subtracted sample by sample.

    Attributes:
        cluster_of_row: the position of each row's cluster (P), in order of first appearance.
        num_clusters: the number of clusters C.
        sizes: the number of rows of each cluster (C).

    Args:
        clusters: what each row belongs to (P), such as its image.
        samples: the number of bootstrap samples.
        seed: the seed of the draws.
    """

    def __init__(self, clusters: Sequence[Hashable], samples: int = 2000, seed: int = 0) -> None:
        positions: dict[Hashable, int] = {}
        self.cluster_of_row: IntArray = np.array(
            [positions.setdefault(cluster, len(positions)) for cluster in clusters], dtype=np.int64
        )
        self.num_clusters = len(positions)
        self.sizes: FloatArray = np.bincount(self.cluster_of_row).astype(np.float64)
        self.samples = samples
        self.seed = seed

    def positions(self) -> Iterator[IntArray]:
        """Yield in chunks (R, C) the positions of the clusters of each sample, in the order of the draws.

        All R add up to `samples`.
        """
        rng = np.random.default_rng(self.seed)
        rows_per_chunk = max(1, CHUNK // self.num_clusters)
        for start in range(0, self.samples, rows_per_chunk):
            size = min(rows_per_chunk, self.samples - start)
            yield rng.integers(self.num_clusters, size=(size, self.num_clusters))

    def counts(self) -> Iterator[IntArray]:
        """Yield in chunks (R, C) how often each cluster is in each sample of `positions`."""
        for positions in self.positions():
            rows = len(positions)
            bins = positions + self.num_clusters * np.arange(rows)[:, None]
            yield np.bincount(bins.ravel(), minlength=positions.size).reshape(rows, self.num_clusters)

    def multinomial_counts(self) -> IntArray:
        """Draw from a multinomial distribution how often each cluster is in each sample (samples, C).

        The distribution is that of `counts`, but the same seed gives other samples. The published figures of
        the layer study come from these draws.
        """
        shares = np.full(self.num_clusters, 1 / self.num_clusters)
        return np.random.default_rng(self.seed).multinomial(self.num_clusters, shares, self.samples)

    def rows(self) -> Iterator[IntArray]:
        """Yield the rows of each sample of `positions`: all rows of its first cluster, then of its second."""
        order = np.argsort(self.cluster_of_row, kind="stable")
        members = np.split(order, np.cumsum(self.sizes[:-1]).astype(np.int64))
        for chunk in self.positions():
            for sample in chunk:
                yield np.concatenate([members[cluster] for cluster in sample])

    def sums(self, values: FloatArray) -> FloatArray:
        """Return the sums (C, ...) of each cluster's rows of `values` (P, ...)."""
        sums = np.zeros((self.num_clusters, *values.shape[1:]))
        np.add.at(sums, self.cluster_of_row, values)
        return sums

    def weighted_means(self, values: FloatArray, weights: NDArray[np.int64] | FloatArray) -> FloatArray:
        """Return means (R, K) over the rows of `values` (P, K), each cluster weighted by `weights` (R, C)."""
        return (weights @ self.sums(values)) / (weights @ self.sizes)[:, None]

    def means(self, values: FloatArray) -> FloatArray:
        """Return the means (samples, K) of `values` (P, K) in each sample."""
        return np.concatenate([self.weighted_means(values, counts) for counts in self.counts()])

    def ratios(self, numerator: FloatArray, denominator: FloatArray | None = None) -> FloatArray:
        """Return the ratio of the sums of two figures (P) in each sample.

        Samples in which the denominator adds up to 0 are left out. Without a denominator the ratio is the
        mean of the numerator.
        """
        above = self.sums(numerator)
        below = self.sizes if denominator is None else self.sums(denominator)
        ratios = []
        for positions in self.positions():
            divisors = below[positions].sum(axis=1)
            is_defined = divisors != 0
            ratios.append(above[positions].sum(axis=1)[is_defined] / divisors[is_defined])
        return np.concatenate(ratios)


def mean_interval(
    values: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the mean of `values` with its percentile-bootstrap interval.

    With a single cluster the interval is the mean itself and says nothing about uncertainty.

    Args:
        values: the values (P).
        clusters: what each value belongs to (P), such as its image; None makes every value its own cluster.
        confidence: the share of the bootstrap samples inside the interval, above 0 and below 1.
        samples: the number of bootstrap samples.
        seed: the seed of the draws.

    Raises:
        ValueError: there is no value, a value is not finite, lengths differ, or an option is out of range.
    """
    array = _checked(values, "values")
    bootstrap = _bootstrap_of(len(array), clusters, confidence, samples, seed)
    mean = bootstrap.sums(array).sum() / bootstrap.sizes.sum()
    return percentile_interval(float(mean), bootstrap.ratios(array), confidence)


def paired_interval(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the mean of `a - b` with its interval.

    Args:
        a: the values of one model (P).
        b: the values of the other model (P), for the same prompts in the same order.
        clusters: as in `mean_interval`.
        confidence: as in `mean_interval`.
        samples: as in `mean_interval`.
        seed: as in `mean_interval`.

    Raises:
        ValueError: as in `mean_interval`.
    """
    first, second = _checked_pair(a, b, "paired values need equal lengths")
    return mean_interval(first - second, clusters, confidence, samples, seed)


def ratio_interval(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the mean of `a` divided by the mean of `b` with its interval.

    Both means are taken over the same samples, because they rise and fall together. Samples in which the mean
    of `b` is 0 have no ratio and are left out.

    Args:
        a: the values of the numerator (P).
        b: the values of the denominator (P), for the same prompts in the same order.
        clusters: as in `mean_interval`.
        confidence: as in `mean_interval`.
        samples: as in `mean_interval`.
        seed: as in `mean_interval`.

    Raises:
        ValueError: as in `mean_interval`, or the mean of `b` is 0.
    """
    numerator, denominator = _checked_pair(a, b, "a ratio needs equal lengths")
    if denominator.sum() == 0:
        raise ValueError("the mean of b is 0: there is no ratio")
    bootstrap = _bootstrap_of(len(numerator), clusters, confidence, samples, seed)
    ratio = bootstrap.sums(numerator).sum() / bootstrap.sums(denominator).sum()
    return percentile_interval(float(ratio), bootstrap.ratios(numerator, denominator), confidence)


def bootstrap_scores(
    score: Callable[[IntArray], float],
    count: int,
    clusters: Sequence[Hashable] | None = None,
    samples: int = 200,
    seed: int = 0,
) -> FloatArray:
    """Return a score of each bootstrap sample (samples) of `count` questions.

    This is for scores that are not a mean over questions (mAP, BLEU).

    Args:
        score: computes the score of the questions with the passed indices; an index occurs as often as the
            question is in the sample. It returns NaN where a sample has no score.
        count: the number of questions P.
        clusters: what each question belongs to (P), such as its image; None makes it its own cluster.
        samples: the number of bootstrap samples; 0 gives an empty array.
        seed: the seed of the draws. Equal seeds draw the same questions.

    Raises:
        ValueError: the number of clusters is not `count`.
    """
    if clusters is not None and len(clusters) != count:
        raise ValueError(f"{count} questions but {len(clusters)} clusters: give one for each question")
    bootstrap = ClusterBootstrap(range(count) if clusters is None else clusters, samples, seed)
    return np.array([score(rows) for rows in bootstrap.rows()])


def percentile_interval(value: float, draws: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return `value` with the percentile interval of bootstrap `draws` (samples).

    Draws that are NaN are left out. If none is left, the interval is NaN.
    """
    array = np.asarray(draws, dtype=np.float64)
    array = array[~np.isnan(array)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(array, [tail, 1 - tail]) if len(array) else (math.nan, math.nan)
    return Interval(value, float(low), float(high))


def mcnemar(a: ArrayLike, b: ArrayLike) -> McNemar:
    """Test whether two models are right equally often: McNemar's exact test, two-sided.

    `a` and `b` (P each, the same questions) hold 1 for a right answer and 0 for a wrong one. Under the null
    hypothesis, each question that only one model answers right is a toss of a fair coin between the two. The
    test takes questions as independent; where many share an image, `paired_interval` is preferable.

    Raises:
        ValueError: the lengths differ, or a value is neither 0 nor 1.
    """
    first, second = _checked_pair(a, b, "paired values need equal lengths")
    for name, values in (("a", first), ("b", second)):
        invalid = values[(values != 0) & (values != 1)]
        if len(invalid):
            raise ValueError(f"{name} holds {invalid[0]:g}: McNemar's test takes 0 (wrong) and 1 (right)")
    first_only, second_only = int((first > second).sum()), int((second > first).sum())
    tosses = first_only + second_only
    p_value = float(stats.binomtest(first_only, tosses).pvalue) if tosses else 1.0
    return McNemar(first_only, second_only, p_value)


def _bootstrap_of(
    rows: int, clusters: Sequence[Hashable] | None, confidence: float, samples: int, seed: int
) -> ClusterBootstrap:
    """Return the bootstrap of `rows` values; None as `clusters` makes each row a cluster."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence!r}: give a number between 0 and 1, such as 0.95")
    if samples < 1:
        raise ValueError(f"samples {samples!r}: give at least one bootstrap sample")
    if clusters is not None and len(clusters) != rows:
        raise ValueError(f"{rows} values but {len(clusters)} clusters: give one for each value")
    return ClusterBootstrap(range(rows) if clusters is None else clusters, samples, seed)


def _checked(values: ArrayLike, name: str) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} of shape {array.shape}: give a list of at least one number")
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name}[{int(np.argmin(np.isfinite(array)))}] is not finite: leave such values out first"
        )
    return array


def _checked_pair(a: ArrayLike, b: ArrayLike, reason: str) -> tuple[FloatArray, FloatArray]:
    first, second = _checked(a, "a"), _checked(b, "b")
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values of a and {len(second)} of b: {reason}")
    return first, second
