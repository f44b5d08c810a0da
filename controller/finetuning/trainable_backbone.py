"""How finetuning gets its backbone: on this process's device, in a precision fit to learn in, or in 4 bits.

And how the trained model comes back in one piece where several processes hold parts of it.
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

from .depths import fixed_layer
from .recipe import ADAPTERS, computes_in_bfloat16, make_trainable, process_count
from .variant_trainer import VariantTrainer


def training_device(options: FinetuneOptions) -> torch.device:
    """The device of this process: of several on a machine with GPUs, each has its own."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and not on_cpu else "cpu"
    if device == "cuda" and process_count() > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return torch.device(device)


def training_dtype(options: FinetuneOptions) -> str:
    """Precision of the weights in training: bfloat16 for those that LoRA leaves alone where layers compute in
    it, else float32, which small updates need."""
    narrow = computes_in_bfloat16(options, training_device(options)) and options.method in ADAPTERS
    return "bfloat16" if narrow else "float32"


def saved_dtype(options: FinetuneOptions) -> torch.dtype:
    """Precision of the finished checkpoint: that in which its layers computed."""
    narrow = computes_in_bfloat16(options, training_device(options))
    return torch.bfloat16 if narrow else torch.float32


def load(options: FinetuneOptions) -> Backbone:
    """The backbone to finetune. What several processes will share the weights of comes to the CPU first."""
    device = training_device(options)
    shared = [os.environ.get(f"ACCELERATE_USE_{way}", "").lower() for way in ("FSDP", "DEEPSPEED")]
    quantised: dict[str, Any] = {}
    if options.method == "qlora":
        quantised = {"quantization_config": four_bits(options, device), "device_map": {"": device}}
    return load_backbone(
        options.backbone,
        insert_layer=fixed_layer(options),
        device="cpu" if "true" in shared else device,
        dtype=training_dtype(options),
        **quantised,
    )


def check_bitsandbytes() -> None:
    """Raises `ValueError` where QLoRA's package is missing."""
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "--method qlora needs bitsandbytes, which is not installed: pip install 'deepinsert[qlora]'"
        )


def four_bits(options: FinetuneOptions, device: torch.device) -> BitsAndBytesConfig:
    """NF4 with doubly quantised constants for the text model's linear layers (QLoRA, arXiv 2305.14314);
    encoder, projector and head stay what they are."""
    source = TINY if options.backbone == "tiny" else options.backbone
    with torch.device("meta"):
        outline = AutoModelForMultimodalLM.from_config(AutoConfig.from_pretrained(source))
    head = outline.get_output_embeddings()
    heads = [name for name, module in outline.named_modules() if module is head]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        llm_int8_skip_modules=[*encoders(outline), *projectors(outline), *heads],
    )


def unquantised(options: FinetuneOptions) -> Callable[[], Backbone] | None:
    """What loads the backbone in ordinary precision, where training had it in 4 bits."""
    if options.method != "qlora":
        return None
    return lambda: load_backbone(
        options.backbone, insert_layer=fixed_layer(options), device="cpu", dtype=training_dtype(options)
    )


def trained_model(trainer: VariantTrainer, options: FinetuneOptions) -> Any:
    """The trained model in one piece. Where processes hold parts of it each, the first gathers them into a
    model of its own, and the others get None."""
    if not is_sharded(trainer.accelerator.state):
        return trainer.accelerator.unwrap_model(trainer.model)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.args.process_index != 0:
        return None
    backbone = load_backbone(
        options.backbone, insert_layer=fixed_layer(options), device="cpu", dtype=training_dtype(options)
    )
    model = make_trainable(backbone.model, options)
    model.load_state_dict(weights, strict=True)
    return model
