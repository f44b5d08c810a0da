"""The GLM-V families: patches on a grid, a downsampling merger, sandwich norms in the decoder."""

from __future__ import annotations

from typing import Any

import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from .family import LAYERS, PLACEHOLDER, TEXT, Family, Refused
from .grids import END, START, VIDEO, VISUAL, modalities, patched

SPECIAL = {
    "image_token_id": PLACEHOLDER,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": START + 2,
    "video_end_token_id": END + 2,
}
ROTARY = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [1, 1, 1],
    "partial_rotary_factor": 0.75,
}
ROTATED = {**TEXT, "rope_parameters": ROTARY}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "out_hidden_size": 32,
}
MOE = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}


def _glm4v() -> PreTrainedModel:
    return hf.Glm4vForConditionalGeneration(
        hf.Glm4vConfig(text_config=ROTATED, vision_config=VISION, **SPECIAL)
    )


def _glm4v_moe() -> PreTrainedModel:
    return hf.Glm4vMoeForConditionalGeneration(
        hf.Glm4vMoeConfig(text_config={**ROTATED, **MOE}, vision_config=VISION, **SPECIAL)
    )


def _composed(config: Any) -> PreTrainedModel:
    return hf.Glm46VForConditionalGeneration(
        config(
            text_config={"model_type": "glm4v_text", **ROTATED},
            vision_config={"model_type": "glm4v_vision", **VISION},
            **SPECIAL,
        )
    )


def _glm46v() -> PreTrainedModel:
    return _composed(hf.Glm46VConfig)


def _glmga() -> PreTrainedModel:
    return _composed(hf.GlmgaConfig)


def _glm_ocr() -> PreTrainedModel:
    return hf.GlmOcrForConditionalGeneration(
        hf.GlmOcrConfig(text_config=ROTATED, vision_config=VISION, **SPECIAL)
    )


def _glm5_next() -> PreTrainedModel:
    text = {
        **TEXT,
        **MOE,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1),
        "layer_types": ["linear_attention", "indexed_attention"] * (LAYERS // 2),
        "index_topk": 4,
        "index_kpool": 2,
        "index_head_dim": 8,
        "index_n_heads": 2,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "hc_mult": 2,
    }
    del text["first_k_dense_replace"]
    vision = {**VISION, "projection_intermediate_size": 32}
    return hf.Glm5NextForConditionalGeneration(
        hf.Glm5NextConfig(text_config=text, vision_config=vision, **SPECIAL)
    )


_IMAGES = patched(wrapped=True)
_VIDEOS = patched(images=False, videos=True, wrapped=True, frames_apart=True, frame_token=PLACEHOLDER)
"""Videos are written with image tokens, so that a batch holds images or videos, not both."""


def _all_video(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs | {"mm_token_type_ids": 2 * (inputs["input_ids"] == PLACEHOLDER).long()}


FAMILIES = [
    Family("glm4v", _glm4v, _IMAGES, VISUAL, modalities),
    Family("glm4v-video", _glm4v, _VIDEOS, VISUAL, _all_video),
    Family("glm4v_moe", _glm4v_moe, _IMAGES, VISUAL, modalities),
    Family("glm4v_moe-video", _glm4v_moe, _VIDEOS, VISUAL, _all_video),
    Family("glm46v", _glm46v, _IMAGES, VISUAL, modalities),
    Family("glm46v-video", _glm46v, _VIDEOS, VISUAL, _all_video),
    Family("glmga", _glmga, _IMAGES, VISUAL, modalities, remark="the class of glm46v"),
    Family("glm_ocr", _glm_ocr, _IMAGES, VISUAL, modalities),
]
REFUSED = [Refused("glm5_next", _glm5_next, "'indexed_attention'")]
