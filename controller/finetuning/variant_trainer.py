"""The `Trainer` that finetunes a variant."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepinsert.backbones.compat.accelerate import is_sharded, uses_fsdp, wrap_layers
from deepinsert.backbones.compat.torch import can_reduce_unused, reduce_unused
from deepinsert.backbones.families import find_stack

from .batches import PromptDataset, PromptOrder
from .depth_loss import depth_loss
from .depths import DepthSampler
from .recipe import parameter_groups
from .resumable_trainer import ResumableTrainer


class VariantTrainer(ResumableTrainer):
    """A `Trainer` for any model with an insertion installed.

    It differs from the stock class in the learning rate of the projector, in an order of prompts that does
    not depend on the number of processes, and in the insert layers that rows may draw. The loss is the
    stock one, computed without a KV cache. If FSDP shards the weights, it wraps the decoder layers.
    """

    def __init__(
        self,
        *args: Any,
        projector_learning_rate: float | None = None,
        group_by: str = "none",
        depths: DepthSampler | None = None,
        **kwargs: Any,
    ) -> None:
        """Make the trainer.

        Args:
            *args: positional arguments of `transformers.Trainer`.
            projector_learning_rate: the projector's learning rate; by default `args.learning_rate`.
            group_by: the order of a `PromptDataset`, as in `PromptOrder`; other data sets keep the stock
                order.
            depths: draws the insert layer of each row of a batch. Batches then contain `row_index` (B,), the
                rows' positions in the data. None trains all rows at the model's insert layer.
            **kwargs: arguments of `ResumableTrainer` and `transformers.Trainer`.
        """
        super().__init__(*args, **kwargs)
        self.projector_learning_rate = projector_learning_rate
        self.group_by = group_by
        self.depths = depths
        self.last_log_time = time.perf_counter()
        # By default FSDP would also wrap encoder layers, which a batch without images never calls.
        model: Any = self.model
        wrap_layers(self.accelerator.state, find_stack(model).layers)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `ResumableTrainer.train` does.

        Raises:
            ValueError: the weights are sharded, and in some steps only a part of the processes has images.
        """
        if is_sharded(self.accelerator.state):
            self._prepare_uneven_batches()
        return super().train(*args, **kwargs)

    def _prepare_uneven_batches(self) -> None:
        """Prepare for steps in which one process has images and another has none.

        Processes that hold parts of the weights must reduce the same gradients at the same time.
        """
        dataset = self.train_dataset
        if self.group_by == "modality-length" or not isinstance(dataset, PromptDataset):
            return
        if len({bool(prompt.images) for prompt in dataset.prompts}) == 1:
            return
        if not uses_fsdp(self.accelerator.state) or not can_reduce_unused():
            raise ValueError(
                "prompts with and without images cannot share a step, because each process holds a part "
                "of the weights: give --group-by modality-length, so that all or none have images in a step"
            )
        if isinstance(self.model, PeftModel):
            # Otherwise the frozen layers below the first adapter finish in another order without images.
            self.model.enable_input_require_grads()
        self.add_callback(ReducesUnusedGradients())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimiser with the projector's learning rate."""
        if self.optimizer is None:
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args)
            trainable: Any = self.model if model is None else model
            rates = (self.args.learning_rate, self.projector_learning_rate)
            groups = parameter_groups(trainable, *rates, self.args.weight_decay)
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def train_sampler(self, dataset: Dataset[Any] | None) -> Sampler[int] | None:
        """Return the order of the prompts; data sets of other classes keep the stock order."""
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
        """Compute the stock loss without a KV cache, or that of `depth_loss` if rows draw their layers."""
        inputs = {**inputs, "use_cache": False}
        if self.depths is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        stock_loss = super().compute_loss
        loss, outputs = depth_loss(self, self.depths, stock_loss, model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the stock scheduler, without a warm-up if there is one step."""
        if num_training_steps == 1:
            self.args.warmup_steps = 0  # a share of one step is rounded up to all of it, at learning rate 0
        return super().create_scheduler(num_training_steps, optimizer)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the stock trainer does, and add the seconds of the step.

        Raises:
            ValueError: the loss or the norm of its gradient is not finite. No checkpoint of such weights is
                written.
        """
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise ValueError(
                    f"step {self.state.global_step}: {name} is {logs[name]}. Training has diverged: give a "
                    f"lower --learning-rate than {self.args.learning_rate:g}, and another --out"
                )
        now = time.perf_counter()
        super().log({**logs, "seconds": now - self.last_log_time}, start_time)
        self.last_log_time = now


class ReducesUnusedGradients(TrainerCallback):
    """Makes FSDP reduce the gradients of weights that a process did not use as zeros."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set up the wrapped model."""
        reduce_unused(kwargs["model"])
