"""LLaVA-1.5's finetuning recipe for any supported model: trained weights, learning rates and schedule.

The methods train LoRA on every linear layer of the text model with the whole projector, every weight outside
the encoders, or the projector alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from deepinsert.backbones.compat.peft import add_adapter
from deepinsert.backbones.compat.trainer import (
    installed_reporters,
    recomputation_arguments,
    supported_reporters,
    use_one_device,
)
from deepinsert.backbones.parts import encoders, frozen_modules, lora_targets, projectors
from deepinsert.controller.options import FinetuneOptions
from deepinsert.controller.runs.processes import Processes

ADAPTER_METHODS = ("lora", "qlora")
LEARNING_RATE = {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5, "projector": 1e-3}
PROJECTOR_RATE_RATIO = 0.1  # relative to LoRA's learning rate: LLaVA trains at 2e-5 and 2e-4
GLOBAL_BATCH_SIZE = {"lora": 128, "qlora": 128, "full": 128, "projector": 256}
WARMUP_SHARE = 0.03  # of the optimiser steps


def make_trainable(model: PreTrainedModel, options: FinetuneOptions) -> Any:
    """Make the weights that `--method` trains require gradients, and the others not.

    LoRA keeps its copy of the projector in the adapter (PEFT's `modules_to_save`), so that the adapter holds
    everything that training changes. Parts named by `--freeze` are not trained.

    Returns:
        A `PeftModel` for LoRA, else `model` itself.

    Raises:
        ValueError: no weight would be trained.
    """
    frozen = frozen_modules(model, options.freeze)
    if options.method in ADAPTER_METHODS:
        trainable = add_lora(model, options, frozen)
    else:
        trainable = model.requires_grad_(options.method == "full")
        for encoder in encoders(model).values():
            encoder.requires_grad_(False)
        for projector in projectors(model).values():
            projector.requires_grad_(True)
        for module in frozen.values():
            module.requires_grad_(False)
    if not any(weight.requires_grad for weight in trainable.parameters()):
        freeze = f" with --freeze {' '.join(options.freeze)}" if options.freeze else ""
        raise ValueError(f"--method {options.method}{freeze}: {type(model).__name__} has nothing to train")
    return trainable


def add_lora(model: PreTrainedModel, options: FinetuneOptions, frozen: dict[str, nn.Module]) -> Any:
    """Return the model with LoRA on the linear layers of its text model, except in the `frozen` modules.

    Raises:
        ValueError: every linear layer is frozen.
    """
    if options.method == "qlora":
        prepare_quantised: Any = prepare_model_for_kbit_training
        model = prepare_quantised(model, use_gradient_checkpointing=False)
    frozen_ids = {id(module) for part in frozen.values() for module in part.modules()}
    whole_modules = [name for name, module in projectors(model).items() if id(module) not in frozen_ids]
    targets = lora_targets(model)
    if all(id(module) in frozen_ids for name, module in model.named_modules() if re.fullmatch(targets, name)):
        raise ValueError(
            f"--freeze {' '.join(options.freeze)} leaves LoRA no layer: use --method projector or full"
        )
    frozen_names = "|".join(map(re.escape, frozen))
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank,
        lora_dropout=options.lora_dropout,
        target_modules=targets,
        exclude_modules=rf"({frozen_names})(\..+)?" if frozen_names else None,
        modules_to_save=whole_modules or None,
        bias="none",
        task_type="CAUSAL_LM",
    )
    adapted = add_adapter(model, config)
    for weight in adapted.parameters():
        # PEFT widens only LoRA's own weights to float32; in bfloat16, small updates of the others are lost.
        if weight.requires_grad:
            weight.data = weight.data.float()
    return adapted


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of trainable weights and of all weights; packed weights of 4 bits count singly."""
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(size for size, is_trainable in sizes if is_trainable), sum(size for size, _ in sizes)


def learning_rate(options: FinetuneOptions) -> float:
    """Return the peak learning rate: `--learning-rate`, or by default LLaVA-1.5's for the method."""
    return LEARNING_RATE[options.method] if options.learning_rate is None else options.learning_rate


def projector_learning_rate(options: FinetuneOptions) -> float:
    """Return the projector's peak learning rate: `--projector-learning-rate`, or by default the model's.

    Under LoRA the default is a tenth of the model's.
    """
    if options.projector_learning_rate is not None:
        return options.projector_learning_rate
    return learning_rate(options) * (PROJECTOR_RATE_RATIO if options.method in ADAPTER_METHODS else 1)


def parameter_groups(
    model: nn.Module, rate: float, projector_rate: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Group the trainable weights for an optimiser.

    Biases and the gains of norms do not decay, as in the stock `Trainer`.

    Args:
        model: the model that `make_trainable` returns.
        rate: the learning rate of all weights outside the projector.
        projector_rate: the projector's learning rate; by default `rate`.
        weight_decay: the decay of matrices.

    Returns:
        Optimiser groups; the first has the learning rate `rate`, which is the one that logs show.
    """
    projector_rate = rate if projector_rate is None else projector_rate
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    projector_ids = {id(weight) for module in projectors(base).values() for weight in module.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for weight in (weight for weight in model.parameters() if weight.requires_grad):
        key = (
            projector_rate if id(weight) in projector_ids else rate,
            weight_decay if weight.ndim > 1 else 0.0,
        )
        groups.setdefault(key, []).append(weight)
    ordered_groups = sorted(groups.items(), key=lambda group: group[0][0] != rate)
    return [
        {"params": weights, "lr": group_rate, "weight_decay": decay}
        for (group_rate, decay), weights in ordered_groups
    ]


def accumulation(options: FinetuneOptions, process_count: int) -> int:
    """Return the number of batches that each of `process_count` processes accumulates per optimiser step.

    By default the number comes as near to the recipe's global batch size as whole batches can.

    Raises:
        ValueError: `--global-batch-size` is not a multiple of what all processes compute at a time.
    """
    if options.gradient_accumulation is not None:
        return options.gradient_accumulation
    batch_size = options.batch_size * process_count
    global_batch_size = options.global_batch_size
    if global_batch_size is None:
        return max(1, round(GLOBAL_BATCH_SIZE[options.method] / batch_size))
    if global_batch_size % batch_size:
        processes = f" on {process_count} processes" if process_count > 1 else ""
        raise ValueError(
            f"--global-batch-size {global_batch_size}: give a multiple of {batch_size} "
            f"(--batch-size {options.batch_size}{processes})"
        )
    return global_batch_size // batch_size


def computes_in_bfloat16(options: FinetuneOptions, device: torch.device) -> bool:
    """Return whether layers compute in bfloat16, whatever dtype their weights have: by default on a GPU."""
    return options.dtype == "bfloat16" or (device.type == "cuda" and options.dtype == "auto")


def training_arguments(
    options: FinetuneOptions, folder: Path, device: torch.device, idle_projector: bool = True
) -> TrainingArguments:
    """Return LLaVA-1.5's schedule: cosine with a warm-up of 3 %, no weight decay, bf16 on a GPU.

    Args:
        options: the options of the command.
        folder: where the Trainer writes its checkpoints.
        device: the device of this process.
        idle_projector: whether a batch may leave the projector unused on one process but not on another.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    arguments = TrainingArguments(
        output_dir=str(folder),
        run_name=folder.parent.name,
        num_train_epochs=options.epochs,
        max_steps=options.steps or -1,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=accumulation(options, Processes.from_environment().world_size),
        learning_rate=learning_rate(options),
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP_SHARE,  # a value below 1 is a share of the steps
        weight_decay=0.0,
        bf16=computes_in_bfloat16(options, device),
        use_cpu=device.type == "cpu",
        seed=options.seed,
        data_seed=options.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=options.save_every,
        report_to=reporters(options.report_to),
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=0,
        ddp_find_unused_parameters=idle_projector,
        **recomputation_arguments(options.gradient_checkpointing),
    )
    if device.type == "cuda":
        use_one_device(arguments)
    return arguments


def reporters(text: str) -> list[str]:
    """Split `"wandb,mlflow"` into the names that the Trainer accepts as `report_to`.

    "tensorboard" is left out, because the run folder always gets TensorBoard events.

    Raises:
        ValueError: the Trainer does not support a name, or its package is not installed.
    """
    names = [name.strip() for name in text.split(",") if name.strip() not in ("", "none", "tensorboard")]
    for name in names:
        if name not in supported_reporters():
            choices = ", ".join(["none", *sorted(supported_reporters())])
            raise ValueError(f"--report-to {name}: give one of {choices}")
        if name not in installed_reporters():
            raise ValueError(f"--report-to {name}: its package is not installed; pip install {name}")
    return names
