"""Liquid's vision models: a decoder of short convolutions, attention and sliding windows."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from .family import PLACEHOLDER, TEXT, Family, Media, flat, noise
from .llava_video import BOTH, VIDEO, either


def lfm2_vl(conv_bias: bool = False) -> PreTrainedModel:
    text: dict[str, Any] = {
        **TEXT,
        "model_type": "lfm2",
        "conv_bias": conv_bias,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    }
    tower = {
        "model_type": "siglip2_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": 4,
        "num_patches": 16,
        "vision_use_head": False,
    }
    return hf.Lfm2VlForConditionalGeneration(
        hf.Lfm2VlConfig(
            text_config=text, vision_config=tower, projector_hidden_size=32, image_token_id=PLACEHOLDER
        )
    )


def _lfm3_vl() -> PreTrainedModel:
    text: dict[str, Any] = {
        **TEXT,
        "model_type": "lfm3",
        "head_dim": 8,
        "conv_L_cache": 3,
        "sliding_window": 6,
        "layer_types": ["conv", "sliding_attention", "full_attention", "sliding_attention"],
    }
    tower = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "patch_size": 4,
        "layer_types": ["conv", "full_attention"],
    }
    return hf.Lfm3VlForConditionalGeneration(
        hf.Lfm3VlConfig(
            text_config=text,
            vision_config=tower,
            projector_hidden_size=32,
            image_token_id=PLACEHOLDER,
            video_token_id=VIDEO,
        )
    )


def _padded_patches(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of 4 x 4 or 2 x 4 patches of 4 x 4 pixels, 2 x 2 patches merged: four tokens or two."""
    heights = [4 - 2 * (seed % 2) for seed in flat(seeds)]
    inputs = {
        "pixel_values": torch.stack([noise(seed, 16, 3 * 4 * 4) for seed in flat(seeds)]),
        "pixel_attention_mask": torch.stack([(torch.arange(16) < 4 * height).long() for height in heights]),
        "spatial_shapes": torch.tensor([[height, 4] for height in heights]),
    }
    return Media(inputs, [[PLACEHOLDER] * height for height in heights])


def _grids(seeds: list[list[int]], frames: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Patches and grids of 4 x 4 or 4 x 8 patches per frame, and the tokens of 2 x 2 merged patches."""
    grids = [(frames, 4, 4 + 4 * (seed // 100 % 2)) for seed in flat(seeds)]
    pairs = zip(flat(seeds), grids, strict=True)
    pixels = [noise(seed, t * rows * columns, 3 * 2 * 4 * 4) for seed, (t, rows, columns) in pairs]
    return torch.cat(pixels), torch.tensor(grids), [t * rows * columns // 4 for t, rows, columns in grids]


def _images(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    pixels, grids, counts = _grids(seeds, 1)
    return Media(
        {"pixel_values": pixels, "image_grid_thw": grids}, [[PLACEHOLDER] * count for count in counts]
    )


def _videos(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    pixels, grids, counts = _grids(seeds, 2)
    return Media(
        {"pixel_values_videos": pixels, "video_grid_thw": grids}, [[VIDEO] * count for count in counts]
    )


FAMILIES = [
    Family("lfm2_vl", lfm2_vl, _padded_patches),
    Family("lfm3_vl", _lfm3_vl, _images),
    Family("lfm3_vl-video", _lfm3_vl, either(_images, _videos), BOTH),
]
