"""What a layer policy is judged by: the simple choices it has to beat, on prompts it has not seen.

All of them are exact, since the reward table knows what every layer of every prompt would have earned.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .statistics import Interval, mean_interval, paired_interval

NEIGHBOURS = 15
FEW_IMAGES = 20
PAPER_MEAN_DEPTH = 0.14
"""Mean depth of the paper's policy on LLaVA-1.5-7B (Appendix D)."""

FloatArray = NDArray[np.float64]


def best_fixed_column(rewards: FloatArray) -> int:
    """Column of `rewards` (P, K) with the highest mean; the shallowest of equals."""
    return int(rewards.mean(axis=0).argmax())


def nearest_neighbour_columns(
    observations: ArrayLike, rewards: FloatArray, queries: ArrayLike, neighbours: int = NEIGHBOURS
) -> NDArray[np.int64]:
    """For each of `queries` (Q, D), the column with the highest mean reward among the nearest prompts.

    `observations` (P, D) and `rewards` (P, K) are the training prompts'; at most `neighbours` of them vote.
    """
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=min(neighbours, len(rewards))).fit(np.asarray(observations))
    nearest = index.kneighbors(np.asarray(queries), return_distance=False)
    return rewards[nearest].mean(axis=1).argmax(axis=1)


def judge(
    chosen: NDArray[np.int64],
    neighbours: NDArray[np.int64],
    train_rewards: FloatArray,
    rewards: FloatArray,
    insert_layers: Sequence[int],
    images: Sequence[Hashable],
) -> dict[str, Any]:
    """The policy's choices beside the simple ones, on held-out prompts.

    `chosen` and `neighbours` (Q) are columns of `rewards` (Q, K) that the policy and the nearest neighbours
    chose; `train_rewards` (P, K) choose the best fixed layer; `images` (Q) cluster the bootstrap. Returns
    `reward` (each with `reward` and its 95 % `confidence_interval`), the paired `difference` of the policy to
    each fixed choice, `share_of_gap` (of the way from the best fixed layer to the oracle; None where there is
    none), and a `verdict`.
    """
    rows = np.arange(len(rewards))
    fixed = best_fixed_column(train_rewards)
    earned = {
        "policy": rewards[rows, chosen],
        "best_fixed": rewards[:, fixed],
        "layer_0": rewards[:, list(insert_layers).index(0)] if 0 in insert_layers else None,
        "nearest_neighbours": rewards[rows, neighbours],
        "uniform": rewards.mean(axis=1),
        "oracle": rewards.max(axis=1),
    }
    reward: dict[str, Any] = {
        name: None if values is None else described(mean_interval(values, images))
        for name, values in earned.items()
    }
    reward["best_fixed"]["insert_layer"] = insert_layers[fixed]
    advantage = paired_interval(earned["policy"], earned["best_fixed"], images)
    gap = reward["oracle"]["reward"] - reward["best_fixed"]["reward"]
    return {
        "reward": reward,
        "difference": {
            "policy_minus_best_fixed": described(advantage),
            "policy_minus_nearest_neighbours": described(
                paired_interval(earned["policy"], earned["nearest_neighbours"], images)
            ),
        },
        "share_of_gap": advantage.mean / gap if gap > 1e-9 else None,
        "verdict": verdict(advantage, insert_layers[fixed], bool((chosen == fixed).all()), len(set(images))),
    }


def verdict(advantage: Interval, best_fixed: int, always: bool, images: int) -> str:
    """One sentence on whether the policy (minus the best fixed layer: `advantage`) was worth it.

    `always` says that the policy chose that layer for every prompt; `images` counts the held-out images.
    """
    figures = f"{advantage.mean:+.4f}, 95 % interval {advantage.low:+.4f} to {advantage.high:+.4f}"
    if always:
        sentence = (
            f"The policy chooses insert layer {best_fixed}, the best fixed layer, for every held-out prompt"
        )
    elif advantage.low > 0:
        sentence = (
            f"On held-out prompts the policy earns more than the best fixed layer {best_fixed} ({figures})"
        )
    elif advantage.high < 0:
        sentence = (
            f"On held-out prompts the policy earns less than the best fixed layer {best_fixed} ({figures}): "
            "use the fixed layer"
        )
    else:
        sentence = (
            f"On held-out prompts the best fixed layer {best_fixed} is as good: the policy's reward cannot "
            f"be told from its ({figures})"
        )
    few = f"; with only {images} held-out images this says little" if images < FEW_IMAGES else ""
    return sentence + few + "."


def described(interval: Interval) -> dict[str, Any]:
    """`interval` as results write it."""
    return {"reward": interval.mean, "confidence_interval": [interval.low, interval.high]}
