"""LLaVA and its relatives: a CLIP or SigLIP tower, a projector, a Llama-like decoder."""

from __future__ import annotations

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
)

from .family import PLACEHOLDER, TEXT, VISION, Family, Media, flat, noise


def _llava() -> PreTrainedModel:
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
            image_token_id=PLACEHOLDER,
            image_seq_length=4,
        )
    )


def _llava_next() -> PreTrainedModel:
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            text_config={"model_type": "mistral", "sliding_window": None, **TEXT},
            vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
            image_token_id=PLACEHOLDER,
            image_grid_pinpoints=[[16, 32], [32, 16]],
        )
    )


def _llava_onevision() -> PreTrainedModel:
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            text_config={"model_type": "qwen2", **TEXT},
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
            image_token_id=PLACEHOLDER,
            video_token_id=PLACEHOLDER + 1,
            image_grid_pinpoints=[[16, 16], [16, 32]],
        )
    )


def square_images(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of 16 x 16 pixels, four tokens each."""
    images = [noise(seed, 3, 16, 16) for seed in flat(seeds)]
    return Media({"pixel_values": torch.stack(images)}, [[PLACEHOLDER] * 4 for _ in images])


def _tiled_images(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of 16 x 32 pixels: the whole and two tiles, with a newline feature after each row of patches."""
    images = [noise(seed, 3, 3, 16, 16) for seed in flat(seeds)]
    sizes = torch.tensor([[16, 32]] * len(images))
    return Media(
        {"pixel_values": torch.stack(images), "image_sizes": sizes}, [[PLACEHOLDER] * 14 for _ in images]
    )


FAMILIES = [
    Family("llava", _llava, square_images),
    Family("llava_next", _llava_next, _tiled_images),
    Family("llava_onevision", _llava_onevision, _tiled_images),
]
