"""Arms in turns: what several ways of doing the same thing cost, measured side by side in one run.

Every round runs every arm once, the order turned around each time, so that whatever else slows the machine
falls on all of them; ratios are taken within a round, against the first arm, which is the stock model. Beside
the wall clock stands the CPU time of the process, which a shared machine's other users disturb far less.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from deepinsert.envs.rewards.time_bonus import synchronise

LEAST_SAVING = 0.02
"""Where the FLOPs allow less saving than this there is nothing to keep, and its share would be noise."""


class Spent(NamedTuple):
    """Milliseconds of the wall clock and of CPU time over all threads of this process."""

    wall: float
    cpu: float

    def over(self, times: int) -> Spent:
        """The mean of `times` equal parts."""
        return Spent(self.wall / times, self.cpu / times)


class Clock:
    """Reads both clocks when the device has done all it was asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> Spent:
        synchronise(self.device)
        return Spent(1000 * time.perf_counter(), 1000 * time.process_time())

    def since(self, start: Spent) -> Spent:
        now = self.now()
        return Spent(now.wall - start.wall, now.cpu - start.cpu)


Arm = Callable[[], Mapping[str, Spent]]
"""One run of one arm: what each measured part of it took, by name, such as `{"step": Spent(...)}`."""


@dataclass(frozen=True)
class Samples:
    """Times of one measured part in ms, `(rounds, arms)` each; arm 0 is the stock model."""

    wall: np.ndarray
    cpu: np.ndarray


def take_turns(
    arms: Sequence[Arm],
    repeats: int,
    warm_up: Sequence[int] | None = None,
    advance: Callable[[int], None] = lambda arm: None,
) -> dict[str, Samples]:
    """Run all arms `repeats` times in turns; the samples of each part that the arms name.

    `warm_up` are the arms run once before anything counts, by default all. `advance` is told after each run
    that counts which arm it was. Python's garbage is collected between the runs and not during them.
    """
    found: list[list[Mapping[str, Spent]]] = []
    collected = gc.isenabled()
    gc.disable()
    try:
        for arm in range(len(arms)) if warm_up is None else warm_up:
            arms[arm]()
            gc.collect()
        for number in range(repeats):
            order = range(len(arms)) if number % 2 == 0 else reversed(range(len(arms)))
            runs: dict[int, Mapping[str, Spent]] = {}
            for arm in order:
                runs[arm] = arms[arm]()
                gc.collect()
                advance(arm)
            found.append([runs[arm] for arm in range(len(arms))])
    finally:
        if collected:
            gc.enable()
    return {
        part: Samples(
            wall=np.array([[run[part].wall for run in runs] for runs in found]),
            cpu=np.array([[run[part].cpu for run in runs] for runs in found]),
        )
        for part in found[0][0]
    }


def compare(samples: Samples, ideal: Sequence[float]) -> list[dict[str, Any]]:
    """Each arm against the first: medians and quartiles of the ratios of the same round.

    `ideal` is the ratio of each arm that the FLOPs allow. An arm's `saving_kept` is
    (1 - time ratio) / (1 - ideal ratio), None where there is next to nothing to save; `over_ideal` is
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
    """The share of the possible saving that was reached; None where less than 2 % could be saved."""
    allowed = 1 - ideal_ratio
    return (1 - time_ratio) / allowed if allowed >= LEAST_SAVING else None
