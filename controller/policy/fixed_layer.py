"""Which one layer to finetune at, and how sure that is, from what every layer earned on a set of prompts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepinsert.controller.statistics import Interval

from .baselines import FEW_IMAGES, best_fixed_column

CONFIDENCE = 0.95
SAMPLES = 2000
CHUNK = 4_000_000  # counts held at once: 32 MB
WIDE = 0.25
"""A set of layers that spans more than this share of the depth leaves the choice open."""
MANY_IMAGES = 10_000_000

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class FixedLayer:
    """The candidate of index `column` earned the most on average.

    `difference` (K) is what each candidate earned less or more than it, with its paired 95 % interval.
    `undecided` are the indices of those whose interval contains 0, `column` among them: which of them is best
    the prompts do not say. `picked` (K) is how often each is the best of a bootstrap sample. All of it by
    bootstrap over `images`; one image alone cannot tell layers apart. `images_needed` is about how many would
    leave only one, at this spread; None where that is as good as never, or where one is left already.
    """

    column: int
    difference: tuple[Interval, ...]
    undecided: tuple[int, ...]
    picked: tuple[float, ...]
    images: int
    images_needed: int | None


def choose_fixed_layer(
    rewards: ArrayLike, images: Sequence[Hashable], samples: int = SAMPLES, seed: int = 0
) -> FixedLayer:
    """The best fixed layer of `rewards` (P, K) on prompts about `images` (P)."""
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
        picked=tuple((np.bincount(means.argmax(axis=1), minlength=len(low)) / samples).tolist()),
        images=len(counts),
        images_needed=_images_needed(differences, against_best.std(axis=0), undecided, best, len(counts)),
    )


def bootstrap_means(sums: FloatArray, counts: FloatArray, samples: int, seed: int) -> FloatArray:
    """Means (samples, K) of draws with replacement of C clusters, of which `sums` (C, K) and `counts` (C)."""
    rng = np.random.default_rng(seed)
    clusters = len(counts)
    means = []
    rows = max(1, CHUNK // clusters)
    for start in range(0, samples, rows):
        size = min(rows, samples - start)
        drawn = rng.integers(clusters, size=(size, clusters)) + clusters * np.arange(size)[:, None]
        often = np.bincount(drawn.ravel(), minlength=size * clusters).reshape(size, clusters)
        means.append((often @ sums) / (often @ counts)[:, None])
    return np.concatenate(means)


def by_image(values: FloatArray, images: Sequence[Hashable]) -> tuple[FloatArray, FloatArray]:
    """Sums (C, K) and counts (C) of the rows of `values` (P, K) of each image, in order of appearance."""
    position: dict[Hashable, int] = {}
    index = np.array([position.setdefault(image, len(position)) for image in images])
    sums = np.zeros((len(position), values.shape[1]))
    np.add.at(sums, index, values)
    return sums, np.bincount(index).astype(np.float64)


def caveat(fixed: FixedLayer, insert_layers: Sequence[int], num_layers: int) -> str | None:
    """What to know before relying on the choice, without a full stop; None where the data decide it."""
    layers = [insert_layers[column] for column in fixed.undecided]
    few = fixed.images < FEW_IMAGES
    if not few and layers[-1] - layers[0] <= WIDE * num_layers:
        return None
    if len(layers) == 1:
        return f"with only {fixed.images} images this says little about others"
    needed = "" if fixed.images_needed is None else f"; about {fixed.images_needed:,} images would"
    count = "1 image does" if fixed.images == 1 else f"{fixed.images} images do"
    return f"{count} not tell insert layers {named(layers)} apart{needed}"


def named(layers: Sequence[int]) -> str:
    """`[1, 2, 3, 7]` as "1 to 3 and 7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts: list[str] = []
    for run in runs:
        parts += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(layer) for layer in run]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _images_needed(
    differences: FloatArray, deviations: FloatArray, undecided: Sequence[int], best: int, images: int
) -> int | None:
    """How many images would put every interval beside 0, to two digits: it shrinks with their square root."""
    rivals = [column for column in undecided if column != best]
    if not rivals or not (differences[rivals] < 0).all():
        return None
    needed = images * float(np.max((1.96 * deviations[rivals] / differences[rivals]) ** 2))
    if not needed < MANY_IMAGES:
        return None
    digits = max(0, int(np.floor(np.log10(max(needed, 1)))) - 1)
    return max(int(-(-needed // 10**digits) * 10**digits), images + 1)
