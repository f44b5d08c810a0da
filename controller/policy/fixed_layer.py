"""Chooses one layer to finetune at from the rewards of a set of prompts, and quantifies the uncertainty."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepinsert.controller.statistics import Interval

from .baselines import best_fixed_column

CONFIDENCE = 0.95
SAMPLES = 2000
CHUNK = 4_000_000  # counts in memory at once: 32 MB
MANY_IMAGES = 10_000_000
"""A larger number of images is not reported as needed."""

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class FixedLayer:
    """The candidate of K with the highest mean reward, and its distance from the others.

    All uncertainty is by bootstrap over images; one image alone does not distinguish layers.

    Attributes:
        column: the index of the candidate.
        difference: each candidate's mean reward minus that candidate's (K), in nats, with its paired 95 %
            interval.
        undecided: the indices of the candidates whose interval contains 0, including `column`; the prompts do
            not decide which of them is best.
        best_shares: the share of bootstrap samples in which each candidate is best (K); empty for one image.
        images: the number of different images.
        images_needed: the approximate number of images that would decide for one candidate at this spread;
            None if it is beyond any practical number, or if one candidate is decided already.
    """

    column: int
    difference: tuple[Interval, ...]
    undecided: tuple[int, ...]
    best_shares: tuple[float, ...]
    images: int
    images_needed: int | None


def choose_fixed_layer(
    rewards: ArrayLike, images: Sequence[Hashable], samples: int = SAMPLES, seed: int = 0
) -> FixedLayer:
    """Choose the best fixed layer.

    Args:
        rewards: the rewards (P, K) of P prompts at K candidates.
        images: the image of each prompt (P), the clusters of the bootstrap.
        samples: the number of bootstrap samples.
        seed: the seed of the bootstrap.
    """
    values = np.asarray(rewards, dtype=np.float64)
    best = best_fixed_column(values)
    sums, counts = by_image(values, images)
    differences = values.mean(axis=0) - values[:, best].mean()
    if len(counts) < 2:
        intervals = tuple(Interval(float(mean), -np.inf, np.inf) for mean in differences)
        return FixedLayer(best, intervals, tuple(range(values.shape[1])), (), len(counts), None)
    means = bootstrap_means(sums, counts, samples, seed)
    against_best = means - means[:, [best]]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(against_best, [tail, 1 - tail], axis=0)
    undecided = tuple(np.flatnonzero((low <= 0) & (high >= 0)).tolist())
    return FixedLayer(
        column=best,
        difference=tuple(map(Interval, differences.tolist(), low.tolist(), high.tolist())),
        undecided=undecided,
        best_shares=tuple((np.bincount(means.argmax(axis=1), minlength=len(low)) / samples).tolist()),
        images=len(counts),
        images_needed=_images_needed(differences, against_best.std(axis=0), undecided, best, len(counts)),
    )


def bootstrap_means(sums: FloatArray, counts: FloatArray, samples: int, seed: int) -> FloatArray:
    """Return the means (samples, K) of bootstrap draws of C clusters.

    Args:
        sums: the sum of each cluster's values (C, K).
        counts: the number of each cluster's values (C).
        samples: the number of draws.
        seed: the seed of the draws.
    """
    rng = np.random.default_rng(seed)
    clusters = len(counts)
    means = []
    rows = max(1, CHUNK // clusters)
    for start in range(0, samples, rows):
        size = min(rows, samples - start)
        drawn = rng.integers(clusters, size=(size, clusters)) + clusters * np.arange(size)[:, None]
        multiplicity = np.bincount(drawn.ravel(), minlength=size * clusters).reshape(size, clusters)
        means.append((multiplicity @ sums) / (multiplicity @ counts)[:, None])
    return np.concatenate(means)


def by_image(values: FloatArray, images: Sequence[Hashable]) -> tuple[FloatArray, FloatArray]:
    """Return sums (C, K) and counts (C) of each image's rows of `values` (P, K), in order of appearance."""
    position: dict[Hashable, int] = {}
    index = np.array([position.setdefault(image, len(position)) for image in images])
    sums = np.zeros((len(position), values.shape[1]))
    np.add.at(sums, index, values)
    return sums, np.bincount(index).astype(np.float64)


def _images_needed(
    differences: FloatArray, deviations: FloatArray, undecided: Sequence[int], best: int, images: int
) -> int | None:
    """Return how many images would move 0 out of every rival's interval, rounded up to two digits.

    An interval's width shrinks with the square root of the number of images.
    """
    rivals = [column for column in undecided if column != best]
    if not rivals or not (differences[rivals] < 0).all():
        return None
    needed = images * float(np.max((1.96 * deviations[rivals] / differences[rivals]) ** 2))
    if not needed < MANY_IMAGES:
        return None
    digits = max(0, int(np.floor(np.log10(max(needed, 1)))) - 1)
    return max(int(-(-needed // 10**digits) * 10**digits), images + 1)
