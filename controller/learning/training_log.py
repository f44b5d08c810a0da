"""The log of a policy's training: rows of mean figures, written as CSV and as TensorBoard events.

The rows are part of a saved training state, so that a training that was killed writes all of them again and
its log has no gap.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm

from deepinsert.controller.runs.atomic_files import atomic_file
from deepinsert.controller.runs.event_file import EventFile

from .training_state import StateFile, model_state

EPISODES_PER_ROW = 2048

STEPS = "time/total_timesteps"


class TrainingLog:
    """Collects rows of named figures and writes them to `progress.csv` and TensorBoard events in `folder`.

    Without a folder the rows are only collected. Events of an earlier start are removed from the folder,
    since `restore` writes their rows again.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.rows: list[dict[str, float]] = []
        self._events: EventFile | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("events.out.tfevents.*"):
                path.unlink()
            self._events = EventFile(folder, first_step=0)

    def restore(self, rows: Iterable[dict[str, float]]) -> None:
        """Add the rows of an earlier start."""
        for row in rows:
            self.add(row)

    def add(self, row: dict[str, float]) -> None:
        """Add a row of figures by tag; its `time/total_timesteps` is the step of the others."""
        self.rows.append(row)
        if self._events is not None:
            self._events.add(int(row[STEPS]), {tag: value for tag, value in row.items() if tag != STEPS})

    def close(self) -> None:
        """Write `progress.csv`."""
        if self.folder is None:
            return
        names = [STEPS, *sorted({name for row in self.rows for name in row} - {STEPS})]
        with (
            atomic_file(self.folder / "progress.csv") as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)


class EpisodeMeans:
    """Means over the episodes since the last row: the reward, its two parts, and the insert layer.

    `reward/total` = `reward/performance` (mean of -loss, nats) + `reward/bonus` (mean of λ · bonus), for
    layers sampled from the policy. These rewards are absolute; the reward that algorithms receive is relative
    to that of layer 0.
    """

    def __init__(self, sums: Sequence[float] = (0.0, 0.0, 0.0, 0.0)) -> None:
        self.sums = np.array(sums, dtype=np.float64)  # episodes, losses, weighted bonuses, layers

    @property
    def episodes(self) -> int:
        """Number of episodes since the last row."""
        return int(self.sums[0])

    def add(self, losses: ArrayLike, weighted_bonuses: ArrayLike, layers: ArrayLike) -> None:
        """Add E episodes; each argument has one entry (E) per episode."""
        self.sums += [np.size(losses), np.sum(losses), np.sum(weighted_bonuses), np.sum(layers)]

    def row(self, steps: int) -> dict[str, float]:
        """Return the log row at `steps` episodes and reset the means."""
        loss, bonus, layer = (self.sums[1:] / self.sums[0]).tolist()
        self.sums[:] = 0
        return {
            STEPS: steps,
            "reward/total": bonus - loss,
            "reward/performance": -loss,
            "reward/bonus": bonus,
            "policy/insert_layer": layer,
        }


class TrainingCallback(BaseCallback):
    """Logs a stable-baselines3 model's training, saves its state and advances a progress bar.

    Args:
        log: receives a row of means per `EPISODES_PER_ROW` episodes.
        state: receives the training state between rollouts.
        means: the means that the next row begins with.
        bar: counts episodes.
    """

    def __init__(self, log: TrainingLog, state: StateFile, means: EpisodeMeans, bar: tqdm[Any]) -> None:
        super().__init__()
        self.log = log
        self.state = state
        self.means = means
        self.bar = bar

    def _on_rollout_start(self) -> None:
        # The model has learned from the last rollout and not begun the next, so the state is complete.
        if self.num_timesteps and self.state.due():
            self.state.save(
                {"model": model_state(self.model), "means": self.means.sums, "rows": self.log.rows}
            )

    def _on_step(self) -> bool:
        infos = self.locals["infos"]
        self.means.add(
            [info["loss"] for info in infos],
            [info["skip_weight"] * info["bonus"] for info in infos],
            [info["insert_layer"] for info in infos],
        )
        self.bar.update(min(len(infos), self.bar.total - self.bar.n))
        if self.means.episodes >= EPISODES_PER_ROW:
            row = self.means.row(self.num_timesteps)
            figures = self.logger.name_to_value
            row.update({name: float(value) for name, value in figures.items() if name.startswith("train/")})
            figures.clear()
            self.log.add(row)
        return True

    def finish(self) -> None:
        """Log the episodes since the last row."""
        if self.means.episodes:
            self.log.add(self.means.row(self.num_timesteps))
