"""What finetuning trains and how: LLaVA-1.5's recipe on any supported model.

LoRA on every linear layer of the text model with the projector trained whole, every weight but the
encoder's, or the projector alone.
"""

from __future__ import annotations

import os
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

ADAPTERS = ("lora", "qlora")
LEARNING_RATE = {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5, "projector": 1e-3}
PROJECTOR_SHARE = 0.1  # of LoRA's learning rate: 2e-5 beside LLaVA's 2e-4
GLOBAL_BATCH = {"lora": 128, "qlora": 128, "full": 128, "projector": 256}
WARMUP = 0.03


def make_trainable(model: PreTrainedModel, options: FinetuneOptions) -> Any:
    """`model` with what `--method` trains requiring gradients: a `PeftModel` for LoRA, else the model itself.

    LoRA keeps its copy of the projector in the adapter (PEFT's `modules_to_save`), so that the adapter is all
    that training changed. What `--freeze` names learns nothing. Raises `ValueError` where nothing is left.
    """
    frozen = frozen_modules(model, options.freeze)
    if options.method in ADAPTERS:
        trained = add_lora(model, options, frozen)
    else:
        trained = model.requires_grad_(options.method == "full")
        for encoder in encoders(model).values():
            encoder.requires_grad_(False)
        for projector in projectors(model).values():
            projector.requires_grad_(True)
        for module in frozen.values():
            module.requires_grad_(False)
    if not any(weight.requires_grad for weight in trained.parameters()):
        left_out = f" with --freeze {' '.join(options.freeze)}" if options.freeze else ""
        raise ValueError(f"--method {options.method}{left_out}: {type(model).__name__} has nothing to train")
    return trained


def add_lora(model: PreTrainedModel, options: FinetuneOptions, frozen: dict[str, nn.Module]) -> Any:
    """The model with LoRA on the linear layers of its text model, but for the `frozen` ones."""
    if options.method == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    inside = {id(module) for part in frozen.values() for module in part.modules()}
    whole = [name for name, module in projectors(model).items() if id(module) not in inside]
    targets = lora_targets(model)
    if all(id(module) in inside for name, module in model.named_modules() if re.fullmatch(targets, name)):
        raise ValueError(
            f"--freeze {' '.join(options.freeze)} leaves LoRA no layer: use --method projector or full"
        )
    names = "|".join(map(re.escape, frozen))
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank,
        lora_dropout=options.lora_dropout,
        target_modules=targets,
        exclude_modules=rf"({names})(\..+)?" if names else None,
        modules_to_save=whole or None,
        bias="none",
        task_type="CAUSAL_LM",
    )
    trained = add_adapter(model, config)
    for weight in trained.parameters():
        if weight.requires_grad:  # PEFT widens LoRA's alone; in bfloat16 small updates are lost
            weight.data = weight.data.float()
    return trained


def count_parameters(model: Any) -> tuple[int, int]:
    """Weights that learn, and all; those of 4 bits, which share bytes, are counted one by one."""
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)


def learning_rate(options: FinetuneOptions) -> float:
    """The peak learning rate: `--learning-rate`, else LLaVA-1.5's for the method."""
    return LEARNING_RATE[options.method] if options.learning_rate is None else options.learning_rate


def projector_learning_rate(options: FinetuneOptions) -> float:
    """The projector's: `--projector-learning-rate`, else under LoRA a tenth of the rate, else the rate."""
    if options.projector_learning_rate is not None:
        return options.projector_learning_rate
    return learning_rate(options) * (PROJECTOR_SHARE if options.method in ADAPTERS else 1)


def parameter_groups(
    model: nn.Module, rate: float, projector_rate: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Trainable weights for the optimiser, the projector's at their own rate (by default the same).

    Biases and the gains of norms do not decay, as in the stock `Trainer`.
    """
    projector_rate = rate if projector_rate is None else projector_rate
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    whole = {id(weight) for module in projectors(base).values() for weight in module.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for weight in (weight for weight in model.parameters() if weight.requires_grad):
        key = (
            projector_rate if id(weight) in whole else rate,
            weight_decay if weight.ndim > 1 else 0.0,
        )
        groups.setdefault(key, []).append(weight)
    # The first group's rate is what logs show.
    ordered = sorted(groups.items(), key=lambda entry: entry[0][0] != rate)
    return [{"params": found, "lr": lr, "weight_decay": decay} for (lr, decay), found in ordered]


def process_count() -> int:
    """Processes that train together, as torchrun and accelerate launch say."""
    return int(os.environ.get("WORLD_SIZE", 1))


def accumulation(options: FinetuneOptions, processes: int) -> int:
    """Batches that each process adds up for one optimiser step.

    Raises `ValueError` where `--global-batch-size` cannot be made of the processes' batches. The recipe's own
    size is met as nearly as they can.
    """
    if options.gradient_accumulation is not None:
        return options.gradient_accumulation
    together = options.batch_size * processes
    wanted = options.global_batch_size
    if wanted is None:
        return max(1, round(GLOBAL_BATCH[options.method] / together))
    if wanted % together:
        of = f"--batch-size {options.batch_size}" + (f" on {processes} processes" if processes > 1 else "")
        raise ValueError(f"--global-batch-size {wanted}: give a multiple of {together} ({of})")
    return wanted // together


def computes_in_bfloat16(options: FinetuneOptions, device: torch.device) -> bool:
    """Whether layers compute in bfloat16, whatever their weights are: on a GPU unless told otherwise."""
    return options.dtype == "bfloat16" or (device.type == "cuda" and options.dtype == "auto")


def training_arguments(
    options: FinetuneOptions, folder: Path, device: torch.device, idle_projector: bool = True
) -> TrainingArguments:
    """LLaVA-1.5's schedule: cosine with a warm-up of 3 %, no weight decay, bf16 on a GPU.

    `idle_projector` says whether a batch may leave the projector out, on one process and not on another.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    arguments = TrainingArguments(
        output_dir=str(folder),
        run_name=folder.parent.name,
        num_train_epochs=options.epochs,
        max_steps=options.steps or -1,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=accumulation(options, process_count()),
        learning_rate=learning_rate(options),
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,  # below 1: a share of the steps
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
    """`"wandb,mlflow"` as the Trainer takes it. TensorBoard events are in the run folder anyway.

    Raises `ValueError` for a name that the Trainer does not know, or whose package is not installed.
    """
    names = [name.strip() for name in text.split(",") if name.strip() not in ("", "none", "tensorboard")]
    for name in names:
        if name not in supported_reporters():
            known = ", ".join(["none", *sorted(supported_reporters())])
            raise ValueError(f"--report-to {name}: give one of {known}")
        if name not in installed_reporters():
            raise ValueError(f"--report-to {name}: its package is not installed; pip install {name}")
    return names
