"""Batches to measure with: random text around images of random pixels, as the model takes them.

Time does not depend on the values, so no processor, tokenizer or data is needed, and any model that can be
built from its configuration can be measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deepinsert.backbones.families import base_model_of, placeholder_token_ids

TEXT_BEFORE_IMAGE = 5
WORDS = (10, 900)  # ids of words in every model measured here, clear of special and placeholder tokens
GRID = (2, 2)  # tiles that LLaVA-NeXT cuts an image into, beside the whole image
PATCHES = 48  # patches along a side of Qwen's image: 576 tokens after merging two by two


@dataclass(frozen=True)
class Batch:
    """Model inputs and what they cost by: lengths of the longest row, images and their tokens in total."""

    inputs: dict[str, Tensor]
    rows: int
    length: int
    """Tokens of a row, padding included: what the stock model computes."""
    text: int
    """Text tokens of the row that has most: what a layer below the insert layer computes for each row."""
    images: int
    multimodal_total: int
    """Multimodal tokens of the whole batch."""

    @property
    def multimodal(self) -> int:
        """What is left of a row at its full length, padding included."""
        return self.length - self.text


def describe(model: PreTrainedModel, inputs: Mapping[str, Tensor], images: int) -> Batch:
    """The batch's numbers, counted in `inputs`."""
    ids = inputs["input_ids"]
    placeholders = torch.tensor(sorted(placeholder_token_ids(model.config)), device=ids.device)
    multimodal = torch.isin(ids, placeholders)
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(multimodal)
    text = int((real & ~multimodal).sum(dim=1).max())
    return Batch(dict(inputs), len(ids), ids.shape[1], text, images, int(multimodal.sum()))


def make_batch(model: Any, texts: Sequence[int], images: Sequence[int]) -> Batch:
    """Rows of `texts[i]` text tokens and `images[i]` images each, left-padded to the longest."""
    base: Any = base_model_of(model)
    generator = torch.Generator().manual_seed(0)
    media, tokens = _media(base, sum(images), generator)
    placeholder = base.config.image_token_id
    rows = []
    for text, number in zip(texts, images, strict=True):
        words = torch.randint(*WORDS, (text,), generator=generator)
        image = torch.full((number * tokens,), placeholder)
        rows.append(torch.cat([words[:TEXT_BEFORE_IMAGE], image, words[TEXT_BEFORE_IMAGE:]]))
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    inputs = {"input_ids": ids, "attention_mask": mask, **media}
    if base.config.model_type == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (ids == placeholder).long()
    moved = {
        name: value.to(base.device, base.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
    return describe(base, moved, sum(images))


def tokens_per_image(model: Any) -> int:
    """Multimodal tokens that one image of `make_batch` becomes."""
    vision: Any = base_model_of(model).config.vision_config
    if model.config.model_type == "qwen2_5_vl":
        return (_patches(vision) // vision.spatial_merge_size) ** 2
    side = vision.image_size // vision.patch_size
    if model.config.model_type == "llava_next":
        height, width = GRID
        return side**2 + height * side * (width * side + 1)
    return side**2


def _patches(vision: Any) -> int:
    """Patches along a side of Qwen's image: fewer for a vision tower made small."""
    return PATCHES if vision.hidden_size >= 1024 else 8


def _media(model: Any, images: int, generator: torch.Generator) -> tuple[dict[str, Tensor], int]:
    """The inputs that hold `images` images, and the tokens that each becomes."""
    if not images:
        return {}, 0
    vision = model.config.vision_config
    kind = model.config.model_type
    if kind == "qwen2_5_vl":
        side = _patches(vision)
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        grid = torch.tensor([[1, side, side]] * images)
        pixels = torch.randn(images * side * side, values, generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": grid}, tokens_per_image(model)
    size = vision.image_size
    if kind == "llava_next":
        height, width = GRID
        pixels = torch.randn(images, 1 + height * width, 3, size, size, generator=generator)
        sizes = torch.tensor([[height * size, width * size]] * images)
        return {"pixel_values": pixels, "image_sizes": sizes}, tokens_per_image(model)
    if kind == "llava":
        return {"pixel_values": torch.randn(images, 3, size, size, generator=generator)}, tokens_per_image(
            model
        )
    raise ValueError(f"model type {kind!r}: batches are made for llava, llava_next and qwen2_5_vl")
