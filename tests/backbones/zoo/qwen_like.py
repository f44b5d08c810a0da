"""The Qwen families: images as rows of patches with 3-D rotary positions, sounds, DeepStack."""

from __future__ import annotations

import torch
import transformers as hf
from transformers import PreTrainedModel

from .family import LAYERS, PLACEHOLDER, TEXT, Family, Media, Refused, flat, noise
from .grids import SPECIAL, VISUAL, modalities, patched

ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
"""3-D rotary positions for heads of width 8."""

VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": 32,
}


def _qwen2_vl() -> PreTrainedModel:
    windows = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(
            text_config={**TEXT, **windows, "rope_parameters": ROTARY}, vision_config=vision, **SPECIAL
        )
    )


def _qwen2_5_vl() -> PreTrainedModel:
    vision = {**VISION, "fullatt_block_indexes": [1], "window_size": 16}
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": ROTARY}, vision_config=vision, **SPECIAL)
    )


INTERLEAVED = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "head_dim": 8,
    "rope_parameters": {**INTERLEAVED, "partial_rotary_factor": 1.0},
}
"""Layers of linear attention and of full attention in turn."""


def _qwen3_5() -> PreTrainedModel:
    vision = {**VISION, "num_position_embeddings": 16}
    return hf.Qwen3_5ForConditionalGeneration(
        hf.Qwen3_5Config(text_config={**TEXT, **LINEAR}, vision_config=vision, **SPECIAL)
    )


def _qwen3_5_moe() -> PreTrainedModel:
    text = {**TEXT, **LINEAR, **EXPERTS, "shared_expert_intermediate_size": 16}
    del text["intermediate_size"]
    vision = {**VISION, "num_position_embeddings": 16}
    return hf.Qwen3_5MoeForConditionalGeneration(
        hf.Qwen3_5MoeConfig(text_config=text, vision_config=vision, **SPECIAL)
    )


def _qwen4_exp() -> PreTrainedModel:
    text = {
        **TEXT,
        **LINEAR,
        **EXPERTS,
        "layer_types": ["linear_attention", "indexed_attention"] * (LAYERS // 2),
        "shared_expert_intermediate_size": 16,
        "hc_count": 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    }
    del text["intermediate_size"]
    vision = {**VISION, "num_position_embeddings": 16}
    return hf.Qwen4ExpForConditionalGeneration(
        hf.Qwen4ExpConfig(text_config=text, vision_config=vision, **SPECIAL)
    )


def _qwen2_audio() -> PreTrainedModel:
    return hf.Qwen2AudioForConditionalGeneration(
        hf.Qwen2AudioConfig(
            text_config={"model_type": "qwen2", **TEXT},
            audio_config={
                "model_type": "qwen2_audio_encoder",
                "num_mel_bins": 8,
                "d_model": 32,
                "encoder_layers": 2,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 48,
                "max_source_positions": 16,
            },
            audio_token_id=PLACEHOLDER,
        )
    )


def _sounds(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Sounds of 32 or 20 mel frames: eight or five tokens."""
    frames = [32 - 12 * (seed % 2) for seed in flat(seeds)]
    mask = torch.stack([(torch.arange(32) < count).long() for count in frames])
    features = torch.stack([noise(seed, 8, 32) for seed in flat(seeds)])
    return Media(
        {"input_features": features, "feature_attention_mask": mask},
        [[PLACEHOLDER] * (count // 4) for count in frames],
    )


FRAMES = patched(videos=True, wrapped=True, frames_apart=True)

FAMILIES = [
    Family("qwen2_vl", _qwen2_vl, patched(), VISUAL, modalities),
    Family("qwen2_vl-video", _qwen2_vl, patched(videos=True), VISUAL, modalities),
    Family("qwen2_5_vl", _qwen2_5_vl, patched(), VISUAL, modalities),
    Family("qwen2_5_vl-video", _qwen2_5_vl, patched(videos=True), VISUAL, modalities),
    Family("qwen3_5", _qwen3_5, patched(wrapped=True), VISUAL, modalities),
    Family("qwen3_5-video", _qwen3_5, FRAMES, VISUAL, modalities),
    Family("qwen3_5_moe", _qwen3_5_moe, FRAMES, VISUAL, modalities),
    Family("qwen2_audio", _qwen2_audio, _sounds),
]

REFUSED = [Refused("qwen4_exp", _qwen4_exp, "'indexed_attention'")]
