"""The range of skip weights λ that an environment plays and a policy answers for.

One λ leaves the observation as it is. A range draws λ for each episode and shows it to the policy, so that
one policy serves every trade between loss and saving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

POWER = 1.5
"""Weights are drawn as this power of what is uniform over the range, and features cut it likewise."""
BEYOND = 0.1
"""Share of the range by which draws reach beyond each of its ends, where they are taken for the end."""
FEATURES = 16
"""Features that show λ. One number would drown among hundreds of an observation's."""


@dataclass(frozen=True)
class SkipWeights:
    """The skip weights from `low` to `high`, both included; equal ends mean one λ.

    Raises `ValueError` unless both are finite, at least 0, and in order.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.low) and np.isfinite(self.high) and 0 <= self.low <= self.high):
            shown = self.low if self.low == self.high else (self.low, self.high)
            raise ValueError(
                f"skip_weight {shown!r}: give a finite weight of at least 0, or two in ascending order"
            )
        object.__setattr__(self, "low", float(self.low))
        object.__setattr__(self, "high", float(self.high))

    @classmethod
    def of(cls, value: float | Sequence[float] | SkipWeights) -> SkipWeights:
        """`value` as a range: one λ, two ends, or a range already."""
        if isinstance(value, SkipWeights):
            return value
        ends = np.asarray(value, dtype=np.float64)
        if ends.shape not in ((), (2,)):
            raise ValueError(f"skip_weight {value!r}: give one weight, or the two ends of a range")
        return cls(float(ends.flat[0]), float(ends.flat[-1]))

    @property
    def single(self) -> bool:
        """Whether there is only one λ."""
        return self.low == self.high

    @property
    def features(self) -> int:
        """F, how many features show λ; none for one λ."""
        return 0 if self.single else FEATURES

    def check(self, skip_weight: float) -> float:
        """`skip_weight` where it is in the range; `ValueError` naming the range otherwise."""
        value = float(skip_weight)
        if not self.low <= value <= self.high:
            raise ValueError(
                f"skip_weight {skip_weight!r} is outside {self}: give one inside, or train for it"
            )
        return value

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        """`count` weights over the range: denser where they are small, since a little more λ changes the best
        layer most there, and a twelfth of them at either end, which has neighbours on one side alone.

        One λ takes nothing from `rng`.
        """
        if self.single:
            return np.full(count, self.low)
        position = np.clip(rng.uniform(-BEYOND, 1 + BEYOND, count), 0, 1)
        return np.clip(self.low + (self.high - self.low) * position**POWER, self.low, self.high)

    def feature(self, skip_weights: ArrayLike) -> NDArray[np.float32]:
        """What the policy sees of each of `skip_weights` (n,): float32 (n, F) in [-1, 1].

        The range is cut into F pieces, shorter where λ is small, from which as many are drawn; feature i
        rises from -1 to 1 across piece i and is flat elsewhere. Together they say λ exactly, weigh as much as
        F of the observation's features, and let a linear layer treat each piece in its own way.

        Raises `ValueError` for a weight outside the range.
        """
        values = np.asarray(skip_weights, dtype=np.float64)
        for value in values[~((values >= self.low) & (values <= self.high))][:1]:
            self.check(value)
        if self.single:
            return np.zeros((len(values), 0), dtype=np.float32)
        position = ((values - self.low) / (self.high - self.low)) ** (1 / POWER) * FEATURES
        pieces = np.clip(position[:, None] - np.arange(FEATURES), 0, 1)
        return (2 * pieces - 1).astype(np.float32)

    def __str__(self) -> str:
        return f"{self.low:g}" if self.single else f"{self.low:g} to {self.high:g}"
