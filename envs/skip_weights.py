"""The range of skip weights λ that an environment draws from and a policy covers.

A single λ leaves the observation as it is. With a range, each episode draws a λ and the observation includes
it, so that one policy covers every trade-off between loss and saving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

POWER = 1.5
"""Drawn weights, and the bounds of the features' intervals, are uniform values to this power."""
OVERSHOOT = 0.1
"""Share of the range by which draws reach beyond each end, before they are clipped to the range."""
NUM_FEATURES = 16
"""Features that represent λ; a single one would carry little weight beside hundreds of other features."""


@dataclass(frozen=True)
class SkipWeights:
    """The skip weights from `low` to `high`, both included; equal ends are a single λ.

    Raises `ValueError` unless both are finite, at least 0, and in ascending order.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.low) and np.isfinite(self.high) and 0 <= self.low <= self.high):
            value = self.low if self.low == self.high else (self.low, self.high)
            raise ValueError(
                f"skip_weight {value!r}: give a finite weight of at least 0, or two in ascending order"
            )
        object.__setattr__(self, "low", float(self.low))
        object.__setattr__(self, "high", float(self.high))

    @classmethod
    def of(cls, value: float | Sequence[float] | SkipWeights) -> SkipWeights:
        """Convert a single λ, the two ends of a range, or a range, to a range.

        Raises `ValueError` for a sequence of another length, and for bad ends.
        """
        if isinstance(value, SkipWeights):
            return value
        ends = np.asarray(value, dtype=np.float64)
        if ends.shape not in ((), (2,)):
            raise ValueError(f"skip_weight {value!r}: give one weight, or the two ends of a range")
        return cls(float(ends.flat[0]), float(ends.flat[-1]))

    @property
    def single(self) -> bool:
        """Whether the range is a single λ."""
        return self.low == self.high

    @property
    def num_features(self) -> int:
        """Number F of features that represent λ; 0 for a single λ."""
        return 0 if self.single else NUM_FEATURES

    def check(self, skip_weight: float) -> float:
        """Return `skip_weight` as a float; `ValueError` where it is outside the range."""
        value = float(skip_weight)
        if not self.low <= value <= self.high:
            raise ValueError(
                f"skip_weight {skip_weight!r} is outside {self}: give one inside, or train for it"
            )
        return value

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        """Draw `count` weights from the range: float64 (count,). A single λ draws nothing from `rng`.

        The density is higher where λ is small, since the best layer changes most there. About a twelfth of
        the draws falls on either end, because an end has neighbours on one side only.
        """
        if self.single:
            return np.full(count, self.low)
        position = np.clip(rng.uniform(-OVERSHOOT, 1 + OVERSHOOT, count), 0, 1)
        return np.clip(self.low + (self.high - self.low) * position**POWER, self.low, self.high)

    def features_of(self, skip_weights: ArrayLike) -> NDArray[np.float32]:
        """Represent each of `skip_weights` (n,) for the policy: float32 (n, F) in [-1, 1].

        F intervals divide the range, shorter where λ is small, each with the same share of draws. Feature i
        rises from -1 to 1 across interval i and is constant elsewhere. Together, the features determine λ
        exactly, weigh as much as F features of the observation, and let a linear layer treat each interval
        separately.

        Raises `ValueError` for a weight outside the range.
        """
        values = np.asarray(skip_weights, dtype=np.float64)
        for value in values[~((values >= self.low) & (values <= self.high))][:1]:
            self.check(value)
        if self.single:
            return np.zeros((len(values), 0), dtype=np.float32)
        position = ((values - self.low) / (self.high - self.low)) ** (1 / POWER) * NUM_FEATURES
        fractions = np.clip(position[:, None] - np.arange(NUM_FEATURES), 0, 1)
        return (2 * fractions - 1).astype(np.float32)

    def __str__(self) -> str:
        return f"{self.low:g}" if self.single else f"{self.low:g} to {self.high:g}"
