"""Small random models of real families, together with matching processors."""

from __future__ import annotations

from typing import Any

import torch
from small_processors import llava_next, qwen
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from zoo.family import TEXT, VISION
from zoo.qwen_like import ROTARY
from zoo.qwen_like import VISION as GRID_VISION

from deepinsert.backbones import Backbone, deep_insert


def llava_next_backbone() -> Backbone:
    processor = llava_next()
    config = LlavaNextConfig(
        text_config={"model_type": "mistral", "sliding_window": None, **text_arguments(processor)},
        vision_config={"model_type": "clip_vision_model", **VISION, "image_size": 28, "patch_size": 14},
        image_token_id=processor.image_token_id,
        image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
    )
    return backbone("llava_next", LlavaNextForConditionalGeneration, config, processor)


def qwen2_5_vl_backbone() -> Backbone:
    processor = qwen()
    ids = {
        f"{name}_token_id": processor.tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "image": "<|image_pad|>",
            "video": "<|video_pad|>",
            "vision_start": "<|vision_start|>",
            "vision_end": "<|vision_end|>",
        }.items()
    }
    config = Qwen2_5_VLConfig(
        text_config={**text_arguments(processor), "rope_parameters": ROTARY},
        vision_config={**GRID_VISION, "fullatt_block_indexes": [1], "patch_size": 14, "window_size": 56},
        **ids,
    )
    return backbone("qwen2_5_vl", Qwen2_5_VLForConditionalGeneration, config, processor)


BUILDERS = {"llava_next": llava_next_backbone, "qwen2_5_vl": qwen2_5_vl_backbone}


def text_arguments(processor: Any) -> dict[str, Any]:
    """Arguments of the zoo's text configuration, with the vocabulary of `processor`."""
    tokenizer = processor.tokenizer
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return {**TEXT, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **special}


def backbone(name: str, model_class: type[PreTrainedModel], config: Any, processor: Any) -> Backbone:
    """A backbone with large random weights, so that a wrong row changes the output visibly.

    Generation yields printable words only, and never ends before its length limit.
    """
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.mul_(8.0)
    model.generation_config.eos_token_id = None
    words = processor.tokenizer.batch_decode([[token] for token in range(len(processor.tokenizer))])
    unprintable = [
        token
        for token, word in enumerate(words)
        if not (word.isascii() and word.isprintable() and word.strip(" <>|"))
    ]
    model.generation_config.suppress_tokens = unprintable + processor.tokenizer.all_special_ids
    return Backbone(model=deep_insert(model), processor=processor, name=name)
