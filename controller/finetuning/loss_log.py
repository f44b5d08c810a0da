"""The training loss of each step: its log in the run folder, its summary and its picture."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepinsert.controller.runs.atomic_files import atomic_file, save_figure
from deepinsert.controller.runs.event_file import EventFile
from deepinsert.controller.runs.progress_bars import progress_bar

FEW_STEPS = 10
COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "seconds")
TENSORBOARD_COLUMNS = ("loss", "learning_rate", "grad_norm")

logger = logging.getLogger("deepinsert")


class LossLog(TrainerCallback):
    """Writes `train_loss.csv` and TensorBoard events to the run folder, and shows a progress bar on stderr.

    The trainer's state, which checkpoints contain, is authoritative: a continued run rewrites the CSV from
    it, and TensorBoard ignores the events of the steps that are repeated.
    """

    def __init__(self, out: Path) -> None:
        """Log to the run folder `out`."""
        self.out = out
        self.path = out / "train_loss.csv"
        self.writer: EventFile | None = None
        self.bar: Iterator[int] = iter(())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Rewrite the CSV, start a file of events and the progress bar, and warn if there are few steps."""
        with atomic_file(self.path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(
                [entry.get(name) for name in COLUMNS] for entry in state.log_history if "loss" in entry
            )
        if args.max_steps <= 0 and state.max_steps < FEW_STEPS:
            size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
            logger.warning(
                "%s steps of %s prompts are few to learn in: give more --epochs, or a smaller "
                "--global-batch-size",
                state.max_steps,
                size,
            )
        self.writer = EventFile(self.out, first_step=state.global_step + 1)
        steps = range(state.global_step, state.max_steps)
        self.bar = progress_bar(steps, "finetune", len(steps))
        next(self.bar, None)
        kwargs["model"].train()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a step to the CSV and to the events, and advance the progress bar."""
        if logs is None or "loss" not in logs:
            return
        row = {**logs, "step": state.global_step}
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow([row.get(name) for name in COLUMNS])
        if self.writer is not None:
            scalars = {f"train/{name}": row[name] for name in TENSORBOARD_COLUMNS}
            self.writer.add(state.global_step, scalars)
        next(self.bar, None)


def logged_losses(trainer: Trainer) -> list[dict[str, float]]:
    """Return what the trainer has logged for each step, with the keys of `COLUMNS`."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def summarise_losses(log: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return the loss of each step in nats, its mean over the last tenth of the steps, and all seconds."""
    curve = [entry["loss"] for entry in log]
    last_tenth = curve[-max(1, len(curve) // 10) :]
    return {
        "train_loss": sum(last_tenth) / len(last_tenth),
        "seconds": sum(entry["seconds"] for entry in log),
        "train_loss_curve": curve,
    }


def plot_loss(log: Sequence[dict[str, float]], path: Path, title: str) -> None:
    """Plot the training loss by step, with its running mean over a tenth of the steps."""
    from matplotlib.figure import Figure

    steps = [entry["step"] for entry in log]
    losses = [entry["loss"] for entry in log]
    window = max(1, len(losses) // 10)
    means = [
        sum(losses[max(0, end - window) : end]) / len(losses[max(0, end - window) : end])
        for end in range(1, len(losses) + 1)
    ]
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="0.75", linewidth=1, label="each step")
    axes.plot(steps, means, color="tab:blue", label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss on answers (nats)", title=title)
    axes.set_ylim(0, 1.05 * max(losses))
    axes.legend(frameon=False)
    save_figure(figure, path)
