"""Means over the prompts of a reward table at chosen insert layers.

In shapes, P counts the table's prompts and K its candidate insert layers; a column is the index of a
candidate.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepinsert.envs.rewards.table import Bonus, RewardTable

from .baselines import best_fixed_column
from .outcomes import FrontierPoint, TrainingSummary


def mean_at(table: RewardTable, columns: ArrayLike) -> dict[str, float | None]:
    """Return means over the prompts of `table` at one column for all or one per prompt (P).

    The means are `loss` in nats, `loss_increase` relative to insert layer 0, `flops_ratio` and `accuracy`;
    those that the table does not contain are None.
    """
    rows = np.arange(len(table))
    columns = np.broadcast_to(np.asarray(columns), len(table))
    loss, stock = float(table.losses[rows, columns].mean()), table.mean_stock_loss
    ratios, correct = table.known_flops_ratio, table.known_correct
    return {
        "loss": loss,
        "loss_increase": None if stock is None else loss - stock,
        "flops_ratio": None if ratios is None else float(ratios[rows, columns].mean()),
        "accuracy": None if correct is None else float(correct[rows, columns].mean()),
    }


def frontier_point(
    table: RewardTable, columns: NDArray[np.int64], skip_weight: float, bonus: Bonus
) -> FrontierPoint:
    """Return the means of choosing `columns` (P) at `skip_weight`."""
    means = mean_at(table, columns)
    loss = means["loss"]
    assert loss is not None
    return FrontierPoint(
        skip_weight=float(skip_weight),
        loss=loss,
        loss_increase=means["loss_increase"],
        flops_ratio=means["flops_ratio"],
        reward=float(table.rewards(skip_weight, bonus)[np.arange(len(table)), columns].mean()),
    )


def summarise_training(table: RewardTable, skip_weight: float, bonus: Bonus) -> TrainingSummary:
    """Return what `table`, of the training prompts, says about the candidates; `skip_weight` is λ."""
    ratios, times = table.known_flops_ratio, table.times
    rewards = table.rewards(skip_weight, bonus)
    return TrainingSummary(
        prompts=len(table),
        loss=tuple(table.losses.mean(axis=0).tolist()),
        flops_ratio=None if ratios is None else tuple(ratios.mean(axis=0).tolist()),
        best_fixed=table.insert_layers[best_fixed_column(rewards)],
        advantage=None,
        times=None if times is None else tuple(times.tolist()),
    )


def fields_of_table(table: RewardTable, skip_weight: float, bonus: Bonus) -> dict[str, Any]:
    """Return the fields of a `PolicyRecord` that follow from its training table, default λ and bonus."""
    return {
        "insert_layers": tuple(table.insert_layers),
        "num_layers": table.num_layers,
        "skip_weight": skip_weight,
        "bonus": bonus,
        "table_digest": table.digest,
        "training": summarise_training(table, skip_weight, bonus),
    }
