"""The `Trainer` that finetunes a variant, and the log that it keeps in the run folder."""

from __future__ import annotations

import csv
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepinsert.backbones.compat.accelerate import is_sharded, uses_fsdp, wrap_layers
from deepinsert.backbones.compat.torch import can_reduce_unused, reduce_unused
from deepinsert.backbones.families import find_stack
from deepinsert.controller.runs.atomic_files import atomic_file
from deepinsert.controller.runs.event_file import EventFile
from deepinsert.controller.runs.progress_bars import progress_bar

from .batches import PromptDataset, PromptOrder
from .checkpoints import ResumableTrainer
from .depths import DepthSampler
from .recipe import parameter_groups

FEW_STEPS = 10
COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "seconds")


class VariantTrainer(ResumableTrainer):
    """A `Trainer` of any model with an insertion installed: the stock loss without a KV cache, a learning
    rate for the projector, an order of prompts that does not depend on the number of processes.

    Takes what `transformers.Trainer` does. `projector_learning_rate` is by default `args.learning_rate`;
    `group_by` orders a `PromptDataset` as `PromptOrder` says, other data sets keep the stock order. With
    `depths` each row of a batch is at the insert layer that it draws; batches then hold `row_index` (B,), the
    rows' positions in the data. Where FSDP shards the weights, it wraps the decoder layers.
    """

    def __init__(
        self,
        *args: Any,
        projector_learning_rate: float | None = None,
        group_by: str = "none",
        depths: DepthSampler | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.projector_learning_rate = projector_learning_rate
        self.group_by = group_by
        self.depths = depths
        self.last_log = time.perf_counter()
        # By default encoder layers would be too, which a process whose batch has no image never calls.
        model: Any = self.model
        wrap_layers(self.accelerator.state, find_stack(model).layers)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if is_sharded(self.accelerator.state):
            self._prepare_uneven_batches()
        return super().train(*args, **kwargs)

    def _prepare_uneven_batches(self) -> None:
        """Make ready for steps in which one process has images and another none: processes that hold parts of
        the weights must share the same gradients at the same time."""
        dataset = self.train_dataset
        if self.group_by == "modality-length" or not isinstance(dataset, PromptDataset):
            return
        if len({bool(prompt.images) for prompt in dataset.prompts}) == 1:
            return
        if not uses_fsdp(self.accelerator.state) or not can_reduce_unused():
            raise ValueError(
                "prompts with and without images, on processes that hold parts of the weights each: give "
                "--group-by modality-length, so that all have images in a step or none has"
            )
        if isinstance(self.model, PeftModel):
            # Without it, frozen layers below the first adapter finish in another order without images.
            self.model.enable_input_require_grads()
        self.add_callback(ReducesUnused())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args)
            trained: Any = self.model if model is None else model
            rates = (self.args.learning_rate, self.projector_learning_rate)
            self.optimizer = kind(parameter_groups(trained, *rates, self.args.weight_decay), **settings)
        return self.optimizer

    def train_sampler(self, dataset: Dataset[Any] | None) -> Sampler[int] | None:
        if not isinstance(dataset, PromptDataset):
            return super().train_sampler(dataset)
        return PromptOrder(
            dataset.prompts,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            batch_size=self.args.per_device_train_batch_size,
            processes=self.args.world_size,
            accumulation=self.args.gradient_accumulation_steps,
            group_by=self.group_by,
        )

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

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if num_training_steps == 1:
            self.args.warmup_steps = 0  # any share of one step, rounded up, would be all of it, at rate 0
        return super().create_scheduler(num_training_steps, optimizer)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the stock one, with the seconds of a step. Raises `ValueError` where the loss or its gradient is
        not finite, before a checkpoint is written of what it makes of the weights."""
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise ValueError(
                    f"step {self.state.global_step}: {name} is {logs[name]}. Training has diverged: give a "
                    f"lower --learning-rate than {self.args.learning_rate:g}, and another --out"
                )
        now = time.perf_counter()
        super().log({**logs, "seconds": now - self.last_log}, start_time)
        self.last_log = now


class ReducesUnused(TrainerCallback):
    """Has FSDP share gradients of weights that a process did not use, such as the projector's, as zeros."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        reduce_unused(kwargs["model"])


class LossLog(TrainerCallback):
    """Progress on stderr, `train_loss.csv` and TensorBoard events.

    The trainer's state, which checkpoints hold, is the truth: a continued run rewrites the CSV from it and
    has TensorBoard forget the steps that are played again.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out / "train_loss.csv"
        self.writer: EventFile | None = None
        self.bar: Iterator[int] = iter(())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with atomic_file(self.path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(
                [entry.get(name) for name in COLUMNS] for entry in state.log_history if "loss" in entry
            )
        if args.max_steps <= 0 and state.max_steps < FEW_STEPS:
            size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
            print(
                f"{state.max_steps} steps of {size} prompts are few to learn in: give more --epochs, or a "
                "smaller --global-batch-size",
                file=sys.stderr,
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
        if logs is None or "loss" not in logs:
            return
        row = {**logs, "step": state.global_step}
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow([row.get(name) for name in COLUMNS])
        if self.writer is not None:
            told = ("loss", "learning_rate", "grad_norm")
            self.writer.add(state.global_step, {f"train/{name}": row[name] for name in told})
        next(self.bar, None)
