"""What training found out about every candidate layer, kept with a policy to tell what to expect of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepinsert.controller.statistics import Interval
from deepinsert.envs.rewards.table import Bonus, RewardTable

from .baselines import best_fixed_column
from .frontier import FrontierPoint, flops_ratios, known_correct, stock_loss


@dataclass(frozen=True)
class Training:
    """What training found out, for telling what to expect of a layer.

    `loss` (K) is the mean over the training prompts at each candidate in nats, `flops_ratio` (K) their mean
    prefill FLOPs and `times` (K) the prefill's measured time, both against insert layer 0 (None where the
    table did not know them), `best_fixed` the candidate with the highest mean reward on them. `advantage` is
    the policy's mean reward on held-out prompts minus that of `best_fixed`, with its 95 % interval; None
    before it was judged. `frontier` is the policy on held-out prompts at a grid over its skip weights.
    """

    prompts: int
    loss: tuple[float, ...]
    flops_ratio: tuple[float, ...] | None
    best_fixed: int
    advantage: Interval | None
    times: tuple[float, ...] | None = None
    frontier: tuple[FrontierPoint, ...] = ()

    @classmethod
    def from_table(cls, table: RewardTable, skip_weight: float, bonus: Bonus) -> Training:
        """What `table`, the training prompts', says; not judged yet."""
        ratios, times = flops_ratios(table), table.times
        rewards = table.rewards(skip_weight, bonus)
        return cls(
            prompts=len(table),
            loss=tuple(table.losses.mean(axis=0).tolist()),
            flops_ratio=None if ratios is None else tuple(ratios.mean(axis=0).tolist()),
            best_fixed=table.insert_layers[best_fixed_column(rewards)],
            advantage=None,
            times=None if times is None else tuple(times.tolist()),
        )

    def loss_increase(self, insert_layers: Sequence[int], column: int) -> float | None:
        """Mean loss at a candidate against insert layer 0's, in nats; None where that is no candidate."""
        return self.loss[column] - self.loss[0] if insert_layers[0] == 0 else None

    def mean_bonus(self, kind: Bonus, depths: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """Mean skip bonus (K) of candidates with the given `depths` (K); None where it is not known."""
        if kind == "depth":
            return depths
        share = self.times if kind == "time" else self.flops_ratio
        return None if share is None else np.clip(1 - np.array(share), 0, 1)


@dataclass(frozen=True)
class Expected:
    """What to expect of an insert layer: mean `loss` of the training prompts there and how much more it is
    than at insert layer 0 (nats; None where that is no candidate), this prompt's prefill FLOPs against insert
    layer 0, and `depth` L / N."""

    loss: float
    loss_increase: float | None
    flops_ratio: float
    depth: float


def mean_at(table: RewardTable, columns: ArrayLike) -> dict[str, float | None]:
    """Means over the prompts of `table` at one column or one each (P): `loss`, its increase against insert
    layer 0, `flops_ratio` and `accuracy`; None for what the table does not know."""
    rows = np.arange(len(table))
    chosen = np.broadcast_to(np.asarray(columns), len(table))
    loss, stock = float(table.losses[rows, chosen].mean()), stock_loss(table)
    ratios, correct = flops_ratios(table), known_correct(table)
    return {
        "loss": loss,
        "loss_increase": None if stock is None else loss - stock,
        "flops_ratio": None if ratios is None else float(ratios[rows, chosen].mean()),
        "accuracy": None if correct is None else float(correct[rows, chosen].mean()),
    }
