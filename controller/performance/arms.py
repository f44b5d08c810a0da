"""Arms in turns: times of several ways of doing the same thing, measured side by side in one run.

Every round runs every arm once, in reversed order each second round, so that whatever else slows the machine
affects all arms alike. Ratios are taken within a round, against the first arm, which is the stock model. The
CPU time of the process is measured beside the wall clock, because other users of a machine disturb it far
less.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from deepinsert.envs.rewards.time_bonus import synchronise

LEAST_SAVING = 0.02
"""Smallest possible saving, as a share of the FLOPs, whose reached part is computed: below it is noise."""


class Duration(NamedTuple):
    """Milliseconds of the wall clock, and of CPU time over all threads of this process."""

    wall: float
    cpu: float

    def mean_of(self, parts: int) -> Duration:
        """Return the mean duration of `parts` equal parts."""
        return Duration(self.wall / parts, self.cpu / parts)


class Clock:
    """Reads the wall clock and the CPU time after all work queued on the device has finished."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> Duration:
        """Return the time since an arbitrary start."""
        synchronise(self.device)
        return Duration(1000 * time.perf_counter(), 1000 * time.process_time())

    def since(self, start: Duration) -> Duration:
        """Return the time since `start`, an earlier `now()`."""
        now = self.now()
        return Duration(now.wall - start.wall, now.cpu - start.cpu)


Arm = Callable[[], Mapping[str, Duration]]
"""Runs one arm once and returns the duration of each measured part, such as `{"step": Duration(...)}`."""


@dataclass(frozen=True)
class Samples:
    """Times of one measured part in ms, `(rounds, arms)` each; arm 0 is the stock model."""

    wall: NDArray[np.float64]
    cpu: NDArray[np.float64]


def take_turns(
    arms: Sequence[Arm],
    repeats: int,
    warm_up: Sequence[int] | None = None,
    advance: Callable[[int], None] = lambda arm: None,
) -> dict[str, Samples]:
    """Run all arms in turns and return the samples of each part that the arms measure.

    Python's garbage is collected between the runs and not during them.

    Args:
        arms: the arms; the first is the stock model.
        repeats: the number of rounds.
        warm_up: indices of the arms that run once before anything counts, by default all.
        advance: is called after each run that counts, with the index of its arm.
    """
    rounds: list[list[Mapping[str, Duration]]] = []
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for arm in range(len(arms)) if warm_up is None else warm_up:
            arms[arm]()
            gc.collect()
        for number in range(repeats):
            order = range(len(arms)) if number % 2 == 0 else reversed(range(len(arms)))
            runs: dict[int, Mapping[str, Duration]] = {}
            for arm in order:
                runs[arm] = arms[arm]()
                gc.collect()
                advance(arm)
            rounds.append([runs[arm] for arm in range(len(arms))])
    finally:
        if was_enabled:
            gc.enable()
    return {
        part: Samples(
            wall=np.array([[duration[part].wall for duration in durations] for durations in rounds]),
            cpu=np.array([[duration[part].cpu for duration in durations] for durations in rounds]),
        )
        for part in rounds[0][0]
    }


def compare(samples: Samples, ideal: Sequence[float]) -> list[dict[str, Any]]:
    """Compare each arm with the first: medians and quartiles of the ratios within a round.

    `ideal` is the time ratio of each arm that the FLOPs allow. An arm's `saving_kept` is
    (1 - time ratio) / (1 - ideal ratio), or None if less than 2 % could be saved; `over_ideal` is
    time ratio / ideal ratio - 1.
    """
    wall, cpu = samples.wall / samples.wall[:, :1], samples.cpu / samples.cpu[:, :1]
    rows = []
    for arm, allowed in enumerate(ideal):
        ratio, cpu_ratio = float(np.median(wall[:, arm])), float(np.median(cpu[:, arm]))
        rows.append(
            {
                "ms": float(np.median(samples.wall[:, arm])),
                "ms_quartiles": np.quantile(samples.wall[:, arm], [0.25, 0.75]).tolist(),
                "cpu_ms": float(np.median(samples.cpu[:, arm])),
                "time_ratio": ratio,
                "time_ratio_quartiles": np.quantile(wall[:, arm], [0.25, 0.75]).tolist(),
                "cpu_time_ratio": cpu_ratio,
                "cpu_time_ratio_quartiles": np.quantile(cpu[:, arm], [0.25, 0.75]).tolist(),
                "ideal_ratio": float(allowed),
                "saving_kept": saving_kept(ratio, allowed),
                "cpu_saving_kept": saving_kept(cpu_ratio, allowed),
                "over_ideal": ratio / allowed - 1,
                "cpu_over_ideal": cpu_ratio / allowed - 1,
            }
        )
    return rows


def saving_kept(time_ratio: float, ideal_ratio: float) -> float | None:
    """Return the share of the possible saving that was reached; None if less than 2 % could be saved."""
    allowed = 1 - ideal_ratio
    return (1 - time_ratio) / allowed if allowed >= LEAST_SAVING else None
