"""Families whose vision tower also adds to what the first decoder layers return (DeepStack)."""

from __future__ import annotations

import transformers as hf
from transformers import PreTrainedModel

from .family import LAYERS, TEXT, Family
from .grids import SPECIAL, VISUAL, modalities, patched
from .qwen_like import EXPERTS, FRAMES, INTERLEAVED, VISION

DEEP_VISION = {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
"""A vision tower two of whose layers add to what the first decoder layers return (DeepStack)."""


def _qwen3_vl() -> PreTrainedModel:
    text = {**TEXT, "head_dim": 8, "rope_parameters": INTERLEAVED}
    return hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(text_config=text, vision_config=DEEP_VISION, **SPECIAL)
    )


def _qwen3_vl_moe() -> PreTrainedModel:
    text = {**TEXT, **EXPERTS, "head_dim": 8, "rope_parameters": INTERLEAVED, "mlp_only_layers": [1]}
    return hf.Qwen3VLMoeForConditionalGeneration(
        hf.Qwen3VLMoeConfig(text_config=text, vision_config=DEEP_VISION, **SPECIAL)
    )


def _cosmos3_omni() -> PreTrainedModel:
    text = {"model_type": "qwen3_vl_text", **TEXT, "head_dim": 8, "rope_parameters": INTERLEAVED}
    vision = {"model_type": "qwen3_vl_vision", **DEEP_VISION}
    return hf.Cosmos3OmniForConditionalGeneration(
        hf.Cosmos3OmniConfig(text_config=text, vision_config=vision, **SPECIAL)
    )


def _cohere_compass() -> PreTrainedModel:
    text = {
        **TEXT,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        "rope_parameters": {"sliding_attention": INTERLEAVED, "full_attention": None},
        "logit_scale": 2.0,
    }
    return hf.CohereCompassForConditionalGeneration(
        hf.CohereCompassConfig(text_config=text, vision_config=DEEP_VISION, **SPECIAL)
    )


FAMILIES = [
    Family("qwen3_vl", _qwen3_vl, patched(wrapped=True), VISUAL, modalities),
    Family("qwen3_vl-video", _qwen3_vl, FRAMES, VISUAL, modalities),
    Family("qwen3_vl_moe", _qwen3_vl_moe, FRAMES, VISUAL, modalities),
    Family("cosmos3_omni", _cosmos3_omni, patched(wrapped=True), VISUAL, modalities),
    Family("cosmos3_omni-video", _cosmos3_omni, FRAMES, VISUAL, modalities),
    Family("cohere_compass", _cohere_compass, patched(wrapped=True), VISUAL, modalities),
    Family("cohere_compass-video", _cohere_compass, FRAMES, VISUAL, modalities),
]
