"""Loads the backbone to finetune, on this process's device and in a precision fit for training or in 4 bits.

It also collects the trained model if several processes hold parts of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, BitsAndBytesConfig

from deepinsert.backbones import Backbone, load_backbone
from deepinsert.backbones.compat.accelerate import is_sharded
from deepinsert.backbones.loading import TINY
from deepinsert.backbones.parts import encoders, projectors
from deepinsert.controller.options import FinetuneOptions
from deepinsert.controller.runs.processes import Processes

from .depths import fixed_layer
from .recipe import ADAPTER_METHODS, computes_in_bfloat16, make_trainable
from .variant_trainer import VariantTrainer


def training_device(options: FinetuneOptions) -> torch.device:
    """Return the device of this process; several processes on a machine with GPUs have one GPU each."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and not on_cpu else "cpu"
    processes = Processes.from_environment()
    if device == "cuda" and processes.world_size > 1:
        device = processes.cuda_device()
    return torch.device(device)


def training_dtype(options: FinetuneOptions) -> str:
    """Return the dtype of the weights in training.

    Weights that LoRA leaves unchanged are bfloat16 if layers compute in it; all others are float32, because
    small updates are lost in bfloat16.
    """
    in_bfloat16 = computes_in_bfloat16(options, training_device(options))
    return "bfloat16" if in_bfloat16 and options.method in ADAPTER_METHODS else "float32"


def saved_dtype(options: FinetuneOptions) -> torch.dtype:
    """Return the dtype of the finished checkpoint: the one in which its layers have computed."""
    in_bfloat16 = computes_in_bfloat16(options, training_device(options))
    return torch.bfloat16 if in_bfloat16 else torch.float32


def load(options: FinetuneOptions) -> Backbone:
    """Load the backbone to finetune; on the CPU first if several processes will share its weights."""
    device = training_device(options)
    sharding = [os.environ.get(f"ACCELERATE_USE_{method}", "").lower() for method in ("FSDP", "DEEPSPEED")]
    quantisation: dict[str, Any] = {}
    if options.method == "qlora":
        quantisation = {"quantization_config": four_bit_config(options, device), "device_map": {"": device}}
    return load_backbone(
        options.backbone,
        insert_layer=fixed_layer(options),
        device="cpu" if "true" in sharding else device,
        dtype=training_dtype(options),
        **quantisation,
    )


def check_bitsandbytes() -> None:
    """Raise `ValueError` if the package that QLoRA needs is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "--method qlora needs bitsandbytes, which is not installed: pip install 'deepinsert[qlora]'"
        )


def four_bit_config(options: FinetuneOptions, device: torch.device) -> BitsAndBytesConfig:
    """Return QLoRA's 4-bit configuration: NF4 with doubly quantised constants (arXiv 2305.14314).

    It quantises the text model's linear layers. Encoders, projectors and the head keep their precision.
    """
    source = TINY if options.backbone == "tiny" else options.backbone
    auto_model: Any = AutoModelForMultimodalLM
    with torch.device("meta"):
        outline = auto_model.from_config(AutoConfig.from_pretrained(source))
    head = outline.get_output_embeddings()
    heads = [name for name, module in outline.named_modules() if module is head]
    make_config: Any = BitsAndBytesConfig
    config: BitsAndBytesConfig = make_config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        llm_int8_skip_modules=[*encoders(outline), *projectors(outline), *heads],
    )
    return config


def load_unquantised(options: FinetuneOptions) -> Backbone:
    """Load the backbone to finetune on the CPU, in the precision of training without quantisation."""
    return load_backbone(
        options.backbone, insert_layer=fixed_layer(options), device="cpu", dtype=training_dtype(options)
    )


def unquantised_loader(options: FinetuneOptions) -> Callable[[], Backbone] | None:
    """Return a function that loads the unquantised backbone, or None if training did not quantise it."""
    return (lambda: load_unquantised(options)) if options.method == "qlora" else None


def trained_model(trainer: VariantTrainer, options: FinetuneOptions) -> Any:
    """Return the trained model in one piece.

    If each process holds a part of the weights, the first process gathers them into a model of its own, and
    the other processes get None.
    """
    if not is_sharded(trainer.accelerator.state):
        return trainer.accelerator.unwrap_model(trainer.model)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.args.process_index != 0:
        return None
    model = make_trainable(load_unquantised(options).model, options)
    model.load_state_dict(weights, strict=True)
    return model
