"""Idefics and its relatives: padded lists of images, a connector that shortens them, a Llama-like decoder."""

from __future__ import annotations

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from .family import PLACEHOLDER, TEXT, VISION, Family, Media, flat, noise

AROUND = PLACEHOLDER + 1
"""The token before and after the placeholders of an image."""

TEXT_OF_IMAGES = {"model_type": "llama", **TEXT}
SHORTENED = {**VISION, "patch_size": 4}
"""A tower whose 16 patches per image become four tokens by a pixel shuffle."""


def _idefics2() -> PreTrainedModel:
    return hf.Idefics2ForConditionalGeneration(
        hf.Idefics2Config(
            text_config={"model_type": "mistral", "sliding_window": None, **TEXT},
            vision_config=VISION,
            perceiver_config={
                "hidden_size": 32,
                "resampler_n_latents": 3,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
                "num_key_value_heads": 1,
            },
            image_token_id=PLACEHOLDER,
        )
    )


def _idefics3() -> PreTrainedModel:
    return hf.Idefics3ForConditionalGeneration(
        hf.Idefics3Config(text_config=TEXT_OF_IMAGES, vision_config=SHORTENED, image_token_id=PLACEHOLDER)
    )


def _smolvlm() -> PreTrainedModel:
    return hf.SmolVLMForConditionalGeneration(
        hf.SmolVLMConfig(text_config=TEXT_OF_IMAGES, vision_config=SHORTENED, image_token_id=PLACEHOLDER)
    )


def listed(images: list[list[Tensor]]) -> Tensor:
    """(B, most images, 3, 16, 16): each row's images, and zeros where it has no more."""
    pixels = torch.zeros(len(images), max(map(len, images)), 3, 16, 16)
    for row, own in enumerate(images):
        for place, image in enumerate(own):
            pixels[row, place] = image
    return pixels


def _masked_images(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of 16 x 16 or 16 x 8 pixels, the rest masked; three tokens each between two others."""
    pixels = listed([[noise(seed, 3, 16, 16) for seed in row] for row in seeds])
    mask = torch.zeros(*pixels.shape[:2], 16, 16, dtype=torch.bool)
    for row, own in enumerate(seeds):
        for place, seed in enumerate(own):
            mask[row, place, :, : 16 - 8 * (seed % 2)] = True
    inputs = {"pixel_values": pixels, "pixel_attention_mask": mask}
    return Media(inputs, [[AROUND] + [PLACEHOLDER] * 3 + [AROUND] for _ in flat(seeds)])


def tiles_of(seeds: list[list[int]]) -> list[list[Tensor]]:
    """The tiles of each row's images, one or two per image."""
    return [
        [noise(10_000 * tile + seed, 3, 16, 16) for seed in row for tile in range(1 + seed % 2)]
        for row in seeds
    ]


def _split_images(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of one or two tiles of 16 x 16 pixels, four tokens per tile, each between two others."""
    tokens = [([AROUND] + [PLACEHOLDER] * 4) * (1 + seed % 2) + [AROUND] for seed in flat(seeds)]
    return Media({"pixel_values": listed(tiles_of(seeds))}, tokens)


FAMILIES = [
    Family("idefics2", _idefics2, _masked_images),
    Family("idefics3", _idefics3, _split_images),
    Family("smolvlm", _smolvlm, _split_images),
]
