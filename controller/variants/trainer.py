"""The `Trainer` that finetunes a variant, and the log that it keeps in the run folder."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..options import FinetuneOptions
from ..runs import progress, replacing
from .checkpoints import ResumableTrainer
from .depths import DepthSampler
from .recipe import parameter_groups

COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "seconds")


class VariantTrainer(ResumableTrainer):
    """The stock loss without a KV cache, the recipe's parameter groups, and the seconds of each step.

    With `depths` each row of a batch is at the insert layer that it draws; batches then hold `row_index`
    (B,), the rows' positions in the data.
    """

    def __init__(
        self, *args: Any, options: FinetuneOptions, depths: DepthSampler | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.options = options
        self.depths = depths
        self.last_log = time.perf_counter()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args)
            trained: Any = self.model if model is None else model
            groups = parameter_groups(trained, self.options)
            self.optimizer = kind(groups, **settings)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        inputs = {**inputs, "use_cache": False}
        if self.depths is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        stock = super().compute_loss
        loss, outputs = self.depths.loss(self, stock, model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        now = time.perf_counter()
        super().log({**logs, "seconds": now - self.last_log}, start_time)
        self.last_log = now


class LossLog(TrainerCallback):
    """Progress on stderr, `train_loss.csv` and TensorBoard events.

    The trainer's state, which checkpoints hold, is the truth: a continued run rewrites the CSV from it and
    has TensorBoard forget the steps that are played again.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out / "train_loss.csv"
        self.writer: SummaryWriter | None = None
        self.bar: Iterator[int] = iter(())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with replacing(self.path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(
                [entry.get(name) for name in COLUMNS] for entry in state.log_history if "loss" in entry
            )
        self.writer = SummaryWriter(str(self.out), purge_step=state.global_step + 1)
        steps = range(state.global_step, state.max_steps)
        self.bar = progress(steps, "finetune", len(steps))
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
        if logs is None or "loss" not in logs:
            return
        row = {**logs, "step": state.global_step}
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow([row.get(name) for name in COLUMNS])
        if self.writer is not None:
            for name in ("loss", "learning_rate", "grad_norm"):
                self.writer.add_scalar(f"train/{name}", row[name], state.global_step)
        next(self.bar, None)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.writer is not None:
            self.writer.close()
