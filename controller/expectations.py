"""What training found out about every candidate layer, kept with a policy to tell what to expect of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from envs.rewards import Bonus, RewardTable

from .baselines import best_fixed_column
from .frontier import FrontierPoint, flops_ratios
from .statistics import Interval


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
        ratios, times = flops_ratios(table), getattr(table, "times", None)
        rewards = table.rewards(skip_weight, bonus)
        return cls(
            prompts=len(table),
            loss=tuple(table.losses.mean(axis=0).tolist()),
            flops_ratio=None if ratios is None else tuple(ratios.mean(axis=0).tolist()),
            best_fixed=table.insert_layers[best_fixed_column(rewards)],
            advantage=None,
            times=None if times is None else tuple(np.asarray(times, dtype=np.float64).tolist()),
        )

    def mean_bonus(self, kind: Bonus, depths: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """Mean skip bonus (K) of candidates with the given `depths` (K); None where it is not known."""
        if kind == "depth":
            return depths
        share = self.times if kind == "time" else self.flops_ratio
        return None if share is None else np.clip(1 - np.array(share), 0, 1)


@dataclass(frozen=True)
class Expected:
    """What to expect of an insert layer: mean `loss` of the training prompts there (nats), this prompt's
    prefill FLOPs against insert layer 0, and `depth` L / N."""

    loss: float
    flops_ratio: float
    depth: float
