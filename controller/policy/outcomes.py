"""Plain data about what a layer policy achieves: its frontier, its training figures, its recommendations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepinsert.controller.statistics import Interval
from deepinsert.envs.rewards.table import Bonus


@dataclass(frozen=True)
class FrontierPoint:
    """Means over prompts at the layers that a policy chooses at one skip weight.

    `loss` and `reward` are in nats; `loss_increase` is relative to insert layer 0 (None if that is no
    candidate), `flops_ratio` is the prefill FLOPs relative to it (None if the table does not contain them).
    """

    skip_weight: float
    loss: float
    loss_increase: float | None
    flops_ratio: float | None
    reward: float


@dataclass(frozen=True)
class TrainingSummary:
    """What is known from training about the candidate layers (K) and about the policy.

    Attributes:
        prompts: number of training prompts.
        loss: mean loss (K) of the training prompts at each candidate, in nats.
        flops_ratio: their mean prefill FLOPs (K) relative to insert layer 0; None if the table had none.
        best_fixed: the candidate with the highest mean reward on them.
        advantage: the policy's mean reward on held-out prompts minus that of `best_fixed`, in nats, with its
            95 % interval; None before the policy was compared with it.
        times: the measured prefill time (K) relative to insert layer 0; None if the table had none.
        frontier: the policy on held-out prompts at a grid over its skip weights; empty if not measured.
    """

    prompts: int
    loss: tuple[float, ...]
    flops_ratio: tuple[float, ...] | None
    best_fixed: int
    advantage: Interval | None
    times: tuple[float, ...] | None = None
    frontier: tuple[FrontierPoint, ...] = ()

    def loss_increase(self, insert_layers: Sequence[int], column: int) -> float | None:
        """Return a candidate's mean loss minus insert layer 0's, in nats; None if layer 0 is no candidate."""
        return self.loss[column] - self.loss[0] if insert_layers[0] == 0 else None

    def mean_bonus(self, kind: Bonus, depths: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """Return the mean skip bonus (K) of candidates with `depths` (K); None if it is not known."""
        if kind == "depth":
            return depths
        share = self.times if kind == "time" else self.flops_ratio
        return None if share is None else np.clip(1 - np.array(share), 0, 1)


@dataclass(frozen=True)
class Expectation:
    """What to expect of an insert layer for one prompt.

    Attributes:
        loss: mean loss of the training prompts at the layer, in nats.
        loss_increase: that minus the mean loss at insert layer 0, in nats; None if layer 0 is no candidate.
        flops_ratio: the prompt's prefill FLOPs relative to insert layer 0.
        depth: `L / N`.
    """

    loss: float
    loss_increase: float | None
    flops_ratio: float
    depth: float


@dataclass(frozen=True)
class Recommendation:
    """An insert layer for one prompt at `skip_weight`.

    `probability` is the policy's probability of `insert_layer`, `probabilities` that of every candidate.
    """

    insert_layer: int
    probability: float
    probabilities: dict[int, float]
    expected: Expectation
    skip_weight: float


@dataclass(frozen=True)
class FixedLayerComparison:
    """A policy compared with one fixed layer on some prompts.

    Attributes:
        advantage: the policy's mean reward minus that of the fixed layer, in nats, with its 95 % interval.
        always: whether the policy chooses the fixed layer for every prompt.
        prompts: number of prompts.
        images: number of different images.
        prompt_set: describes the prompts in sentences.
    """

    advantage: Interval
    always: bool
    prompts: int
    images: int
    prompt_set: str

    @property
    def wins(self) -> bool:
        """Whether the policy's advantage is significant; one image is never enough."""
        return not self.always and self.advantage.low > 0 and self.images > 1
