"""Cohere's vision models: tiles merged as in InternVL, a decoder with sliding windows in some layers."""

from __future__ import annotations

from typing import Any

import transformers as hf
from transformers import PreTrainedModel

from .family import PLACEHOLDER, TEXT, Family
from .internvl_like import tiles
from .llava_like import SIGLIP

COHERE2: dict[str, Any] = {
    "model_type": "cohere2",
    **TEXT,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "logit_scale": 1.0,
}
"""Every other layer sees six positions back, and has rotary positions while the rest has none."""


def _aya_vision() -> PreTrainedModel:
    return hf.AyaVisionForConditionalGeneration(
        hf.AyaVisionConfig(
            text_config=COHERE2, vision_config={**SIGLIP, "patch_size": 4}, image_token_id=PLACEHOLDER
        )
    )


def _cohere2_vision() -> PreTrainedModel:
    return hf.Cohere2VisionForConditionalGeneration(
        hf.Cohere2VisionConfig(
            text_config=COHERE2,
            vision_config={**SIGLIP, "patch_size": 4},
            alignment_intermediate_size=64,
            image_token_id=PLACEHOLDER,
        )
    )


FAMILIES = [
    Family("aya_vision", _aya_vision, tiles),
    Family("cohere2_vision", _cohere2_vision, tiles),
]
