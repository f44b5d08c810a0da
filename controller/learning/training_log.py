"""The log of a policy's training: a row of figures now and then, as CSV and as TensorBoard events.

Rows are kept in memory too, so that a training that was killed writes them all again and its log has no gap.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm

from deepinsert.controller.runs.folder import replacing

from .training_state import StateFile, model_state

ROW = 2048
"""Episodes that a row is the mean of."""

STEPS = "time/total_timesteps"


class TrainingLog:
    """Rows of named figures in `progress.csv` and TensorBoard events of `folder`; None only keeps them."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.rows: list[dict[str, float]] = []
        self._events: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            folder.mkdir(parents=True, exist_ok=True)
            for events in folder.glob("events.out.tfevents.*"):
                events.unlink()  # of an earlier start, whose rows are written again
            self._events = SummaryWriter(str(folder))

    def restore(self, rows: Iterable[dict[str, float]]) -> None:
        """Begin with the rows of an earlier start."""
        for row in rows:
            self.add(row)

    def add(self, row: dict[str, float]) -> None:
        """A row; it names its `time/total_timesteps`."""
        self.rows.append(row)
        if self._events is not None:
            for name, value in row.items():
                if name != STEPS:
                    self._events.add_scalar(name, value, int(row[STEPS]))

    def close(self) -> None:
        """Write `progress.csv` and end the events."""
        if self.folder is None:
            return
        self._events.close()
        names = [STEPS, *sorted({name for row in self.rows for name in row} - {STEPS})]
        with (
            replacing(self.folder / "progress.csv") as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)


class Means:
    """Means over the episodes since the last row: the reward and its two parts, and the insert layer.

    `reward/total` = `reward/performance` (mean of -loss, nats) + `reward/bonus` (mean of λ · bonus), for
    layers drawn from the policy. The reward that algorithms see is relative to layer 0; these are not.
    """

    def __init__(self, sums: Sequence[float] = (0.0, 0.0, 0.0, 0.0)) -> None:
        self.sums = np.array(sums, dtype=np.float64)  # episodes, losses, weighted bonuses, layers

    def add(self, losses: Any, weighted_bonuses: Any, layers: Any) -> None:
        """Episodes, one for each entry of the three lists."""
        self.sums += [len(losses), np.sum(losses), np.sum(weighted_bonuses), np.sum(layers)]

    def row(self, steps: int) -> dict[str, float]:
        """The row of `steps` episodes played; begins anew."""
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
    """Keeps the log and the state of a stable-baselines3 model that learns, and shows how far it is."""

    def __init__(self, log: TrainingLog, state: StateFile, means: Means, bar: tqdm[Any]) -> None:
        super().__init__()
        self.log = log
        self.state = state
        self.means = means
        self.bar = bar

    def _on_rollout_start(self) -> None:
        # The model has learned from the last rollout and not begun the next: nothing is under way.
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
        if self.means.sums[0] >= ROW:
            row = self.means.row(self.num_timesteps)
            figures = self.logger.name_to_value
            row.update({name: float(value) for name, value in figures.items() if name.startswith("train/")})
            figures.clear()
            self.log.add(row)
        return True

    def finish(self) -> None:
        """A last row of the episodes that are left."""
        if self.means.sums[0]:
            self.log.add(self.means.row(self.num_timesteps))
