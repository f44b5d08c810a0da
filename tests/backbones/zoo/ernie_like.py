"""ERNIE 4.5 VL and PaddleOCR-VL: an ERNIE decoder with 3-D rotary positions."""

from __future__ import annotations

import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from .family import LAYERS, PLACEHOLDER, TEXT, Family, Media
from .grids import END, SPECIAL, START, VIDEO, VISUAL, modalities, patched

ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def _ernie() -> PreTrainedModel:
    text = {
        **TEXT,
        "rope_parameters": ROTARY,
        "mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1),
        "moe_intermediate_size": [16, 16],
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "moe_k": 2,
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4}
    special = {
        "image_token_id": PLACEHOLDER,
        "video_token_id": VIDEO,
        "image_start_token_id": START,
        "image_end_token_id": END,
        "video_start_token_id": START + 2,
        "video_end_token_id": END + 2,
    }
    return hf.Ernie4_5_VLMoeForConditionalGeneration(
        hf.Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision, **special)
    )


def _expert_kinds(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The start and end of an image are text tokens that the experts for images treat."""
    ids = inputs["input_ids"]
    inputs = modalities(inputs)
    wrapping = (ids == START) | (ids == END)
    return inputs | {"moe_mm_token_type_ids": (inputs["mm_token_type_ids"] > 0).long() + wrapping.long()}


def _paddleocr_vl() -> PreTrainedModel:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    }
    text = {**TEXT, "head_dim": 8, "rope_parameters": ROTARY}
    return hf.PaddleOCRVLForConditionalGeneration(
        hf.PaddleOCRVLConfig(text_config=text, vision_config=vision, **SPECIAL)
    )


def _square_patches(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Patches as small images instead of rows."""
    media = patched(values=3 * 4 * 4, wrapped=True)(model, seeds)
    pixels = media.inputs["pixel_values"].view(-1, 3, 4, 4)
    return Media(media.inputs | {"pixel_values": pixels}, media.tokens)


_ERNIE_IMAGES = patched(values=3 * 4 * 4, wrapped=True)
_ERNIE_VIDEOS = patched(videos=True, values=3 * 4 * 4, wrapped=True, frames_merged=2)

FAMILIES = [
    Family(
        "ernie4_5_vl_moe",
        _ernie,
        _ERNIE_IMAGES,
        VISUAL,
        _expert_kinds,
        without={
            "generation": "generate() without a cache fails in the stock model: its moe_mm_token_type_ids do "
            "not grow with the prompt; ernie4_5_vl_moe-video generates without them"
        },
    ),
    Family("ernie4_5_vl_moe-video", _ernie, _ERNIE_VIDEOS, VISUAL, modalities),
    Family("paddleocr_vl", _paddleocr_vl, _square_patches, VISUAL, modalities),
]
