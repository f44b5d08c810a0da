"""What finetuning trains and how: LLaVA-1.5's recipe on any supported model.

LoRA on every linear layer of the text model with the projector trained whole, or every weight but the
encoder's.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from backbones.families import find_stack

from ..options import FinetuneOptions

LEARNING_RATE = {"lora": 2e-4, "full": 2e-5}
PROJECTOR_SHARE = 0.1  # of LoRA's learning rate: 2e-5 beside LLaVA's 2e-4
LORA_DROPOUT = 0.05
WARMUP = 0.03
# Projectors that live inside the encoder, as Qwen2-VL's does.
INNER_PROJECTORS = ("merger", "multi_modal_projector", "projector")


def encoders(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The encoders of the model's modalities by dotted name, such as `model.vision_tower`."""
    found = {}
    names = {module: name for name, module in model.named_modules()}
    for modality in ("image", "audio"):
        encoder = model.get_encoder(modality)
        # The model (or its base) itself is the stock answer where there is none.
        if encoder is not model and encoder is not model.base_model:
            found[names[encoder]] = encoder
    return found


def projectors(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules between encoder and text model by dotted name, such as `model.multi_modal_projector`."""
    found = {}
    known = encoders(model)
    for name, encoder in known.items():
        for part in INNER_PROJECTORS:
            if hasattr(encoder, part):
                found[f"{name}.{part}"] = getattr(encoder, part)
    stack = find_stack(model)
    parent = model.base_model
    names = {module: name for name, module in model.named_modules()}
    for child in parent.children():
        inside = set(child.modules())
        has_others = stack in inside or any(encoder in inside for encoder in known.values())
        if (
            not has_others
            and any(True for _ in child.parameters())
            and child is not model.get_output_embeddings()
        ):
            found[names[child]] = child
    return found


def lora_targets(model: PreTrainedModel) -> str:
    """A pattern of the full names of the text model's linear layers, as PEFT's `target_modules` takes it.

    `lm_head` is not among them: it is no part of the decoder stack. Raises `ValueError` where the text model
    has no `nn.Linear`.
    """
    stack = find_stack(model)
    prefix = next(name for name, module in model.named_modules() if module is stack)
    kinds = sorted(
        {name.rpartition(".")[2] for name, module in stack.named_modules() if isinstance(module, nn.Linear)}
    )
    if not kinds:
        raise ValueError(f"{type(model).__name__} has no nn.Linear in its text model: use --method full")
    return rf"{re.escape(prefix)}\.(.+\.)?({'|'.join(map(re.escape, kinds))})"


def make_trainable(model: PreTrainedModel, options: FinetuneOptions) -> Any:
    """`model` with what `--method` trains requiring gradients: a `PeftModel` for LoRA, else the model itself.

    LoRA keeps its copy of the projector in the adapter (PEFT's `modules_to_save`), so that the adapter is all
    that training changed.
    """
    if options.method == "lora":
        config = LoraConfig(
            r=options.lora_rank,
            lora_alpha=2 * options.lora_rank,
            lora_dropout=LORA_DROPOUT,
            target_modules=lora_targets(model),
            modules_to_save=list(projectors(model)) or None,
            bias="none",
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            # PEFT asks the model by a name that transformers has begun to replace.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            return get_peft_model(model, config)
    model.requires_grad_(True)
    for encoder in encoders(model).values():
        encoder.requires_grad_(False)
    for projector in projectors(model).values():
        projector.requires_grad_(True)
    return model


def learning_rate(options: FinetuneOptions) -> float:
    """The peak learning rate: `--learning-rate`, else LLaVA-1.5's for the method."""
    return LEARNING_RATE[options.method] if options.learning_rate is None else options.learning_rate


def parameter_groups(model: nn.Module, options: FinetuneOptions) -> list[dict[str, Any]]:
    """Trainable weights for the optimiser; under LoRA the projector's learn at a tenth of the rate."""
    rate = learning_rate(options)
    trainable = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    whole = [weight for name, weight in trainable if ".modules_to_save." in name]
    main = [weight for name, weight in trainable if ".modules_to_save." not in name]
    groups = [{"params": main, "lr": rate}]
    if whole:
        groups.append({"params": whole, "lr": PROJECTOR_SHARE * rate})
    return groups


def training_arguments(options: FinetuneOptions, folder: Path, device: torch.device) -> TrainingArguments:
    """LLaVA-1.5's schedule: cosine with a warm-up of 3 %, no weight decay, bf16 on a GPU."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=learning_rate(options),
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,  # below 1: a share of the steps
        weight_decay=0.0,
        bf16=device.type == "cuda",
        use_cpu=device.type == "cpu",
        seed=options.seed,
        data_seed=options.seed,
        logging_steps=1,
        save_strategy="steps",
        save_steps=options.save_every,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=0,
    )
    # One process drives one device; DataParallel over every GPU in sight would split the batch silently.
    if device.type == "cuda":
        arguments._n_gpu = 1
    return arguments
