"""LLaVA and its relatives: a CLIP or SigLIP tower, a projector, a Llama-like decoder."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from .family import PLACEHOLDER, TEXT, VISION, Family, Media, flat, noise

CLIP = {"model_type": "clip_vision_model", "projection_dim": 16, **VISION}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION}


def _llava(**text: Any) -> PreTrainedModel:
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config={"model_type": "llama", **TEXT, **text},
            vision_config=CLIP,
            image_token_id=PLACEHOLDER,
            image_seq_length=4,
        )
    )


def _vipllava() -> PreTrainedModel:
    return hf.VipLlavaForConditionalGeneration(
        hf.VipLlavaConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config=CLIP,
            vision_feature_layer=[-1, -2],
            image_token_id=PLACEHOLDER,
        )
    )


def _llava_next() -> PreTrainedModel:
    return hf.LlavaNextForConditionalGeneration(
        hf.LlavaNextConfig(
            text_config={"model_type": "mistral", "sliding_window": None, **TEXT},
            vision_config=CLIP,
            image_token_id=PLACEHOLDER,
            image_grid_pinpoints=[[16, 32], [32, 16]],
        )
    )


def llava_onevision() -> PreTrainedModel:
    return hf.LlavaOnevisionForConditionalGeneration(
        hf.LlavaOnevisionConfig(
            text_config={"model_type": "qwen2", **TEXT},
            vision_config=SIGLIP,
            image_token_id=PLACEHOLDER,
            video_token_id=PLACEHOLDER + 1,
            image_grid_pinpoints=[[16, 16], [16, 32], [32, 16]],
        )
    )


def square_images(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of 16 x 16 pixels, four tokens each."""
    images = [noise(seed, 3, 16, 16) for seed in flat(seeds)]
    return Media({"pixel_values": torch.stack(images)}, [[PLACEHOLDER] * 4 for _ in images])


def tiled_images(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of 16 x 32 or 32 x 16 pixels: the whole and two tiles, each row of patches with a newline."""
    images = [noise(seed, 3, 3, 16, 16) for seed in flat(seeds)]
    wide = [seed % 2 == 1 for seed in flat(seeds)]
    sizes = torch.tensor([[16, 32] if it else [32, 16] for it in wide])
    return Media(
        {"pixel_values": torch.stack(images), "image_sizes": sizes},
        [[PLACEHOLDER] * (4 + (2 * 5 if it else 4 * 3)) for it in wide],
    )


FAMILIES = [
    Family("llava", _llava, square_images),
    Family("llava-mistral", partial(_llava, model_type="mistral", sliding_window=6), square_images),
    Family("vipllava", _vipllava, square_images),
    Family("llava_next", _llava_next, tiled_images),
    Family("llava_onevision", llava_onevision, tiled_images),
]
