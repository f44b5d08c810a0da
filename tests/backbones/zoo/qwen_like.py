"""The Qwen families: images as rows of patches with 3-D rotary positions, sounds, DeepStack."""

from __future__ import annotations

import torch
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
)

from .family import PLACEHOLDER, TEXT, Family, Media, flat, noise, token_types

ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
"""3-D rotary positions for heads of width 8."""

SPECIAL = {
    "image_token_id": PLACEHOLDER,
    "video_token_id": PLACEHOLDER + 1,
    "vision_start_token_id": PLACEHOLDER + 2,
    "vision_end_token_id": PLACEHOLDER + 3,
}


def _qwen2_5_vl() -> PreTrainedModel:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
        "window_size": 16,
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": ROTARY}, vision_config=vision, **SPECIAL)
    )


def _qwen2_audio() -> PreTrainedModel:
    return Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(
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


def patched_images(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of 4 x 4 or 4 x 8 patches of 4 x 4 pixels, 2 x 2 patches merged: four or eight tokens."""
    grids = [(1, 4, 4 + 4 * (seed % 2)) for seed in flat(seeds)]
    pixels = [
        noise(seed, rows * columns, 3 * 2 * 4 * 4)
        for seed, (_, rows, columns) in zip(flat(seeds), grids, strict=True)
    ]
    return Media(
        {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids)},
        [[PLACEHOLDER] * (rows * columns // 4) for _, rows, columns in grids],
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


FAMILIES = [
    Family("qwen2_5_vl", _qwen2_5_vl, patched_images, finish=token_types),
    Family("qwen2_audio", _qwen2_audio, _sounds),
]
