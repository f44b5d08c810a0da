"""Chooses one layer to finetune at from the rewards of a set of prompts, and quantifies the uncertainty."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepinsert.controller.statistics import ClusterBootstrap, Interval

from .baselines import best_fixed_column

CONFIDENCE = 0.95
SAMPLES = 2000
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
    bootstrap = ClusterBootstrap(images, samples, seed)
    image_count = bootstrap.num_clusters
    differences = values.mean(axis=0) - values[:, best].mean()
    if image_count < 2:
        intervals = tuple(Interval(float(mean), -np.inf, np.inf) for mean in differences)
        return FixedLayer(best, intervals, tuple(range(values.shape[1])), (), image_count, None)
    means = bootstrap.means(values)
    against_best = means - means[:, [best]]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(against_best, [tail, 1 - tail], axis=0)
    undecided = tuple(np.flatnonzero((low <= 0) & (high >= 0)).tolist())
    return FixedLayer(
        column=best,
        difference=tuple(map(Interval, differences.tolist(), low.tolist(), high.tolist())),
        undecided=undecided,
        best_shares=tuple((np.bincount(means.argmax(axis=1), minlength=len(low)) / samples).tolist()),
        images=image_count,
        images_needed=_images_needed(differences, against_best.std(axis=0), undecided, best, image_count),
    )


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
