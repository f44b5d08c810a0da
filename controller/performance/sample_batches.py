"""Batches to measure with: random text around images of random pixels, in the form of model inputs.

Time does not depend on the values, so a model can be measured without processor, tokenizer or data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deepinsert.backbones.families import base_model_of, placeholder_token_ids
from deepinsert.backbones.loading import to_model

TEXT_BEFORE_IMAGE = 5
"""Text tokens before the images of a row."""
WORDS = (10, 900)
"""Range of ids that are words in every model measured here, neither special nor placeholder tokens."""
GRID = (2, 2)
"""Rows and columns of tiles that LLaVA-NeXT cuts an image into, beside the whole image."""
PATCHES = 48
"""Patches along a side of Qwen's image, which become 576 tokens after merging two by two."""


@dataclass(frozen=True)
class Batch:
    """Model inputs, with the numbers that their cost depends on."""

    inputs: dict[str, Tensor]
    rows: int
    length: int
    """Tokens per row, padding included, which the stock model computes."""
    text: int
    """Text tokens of the row with most text, which a layer below the insert layer computes per row."""
    images: int
    multimodal_total: int
    """Multimodal tokens of the whole batch."""

    @property
    def multimodal(self) -> int:
        """Tokens per row beyond `text`, padding included."""
        return self.length - self.text


def describe_batch(model: PreTrainedModel, inputs: Mapping[str, Tensor], images: int) -> Batch:
    """Count the tokens in `inputs`, which hold `images` images in total."""
    ids = inputs["input_ids"]
    placeholders = torch.tensor(sorted(placeholder_token_ids(model.config)), device=ids.device)
    multimodal = torch.isin(ids, placeholders)
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(multimodal)
    text = int((real & ~multimodal).sum(dim=1).max())
    return Batch(dict(inputs), len(ids), ids.shape[1], text, images, int(multimodal.sum()))


def make_batch(model: Any, texts: Sequence[int], images: Sequence[int]) -> Batch:
    """Make a left-padded batch whose row i has `texts[i]` text tokens and `images[i]` images."""
    base: Any = base_model_of(model)
    generator = torch.Generator().manual_seed(0)
    image_inputs = _image_inputs(base, sum(images), generator)
    tokens = tokens_per_image(base) if sum(images) else 0
    placeholder = base.config.image_token_id
    rows = []
    for text, number in zip(texts, images, strict=True):
        words = torch.randint(*WORDS, (text,), generator=generator)
        image = torch.full((number * tokens,), placeholder)
        rows.append(torch.cat([words[:TEXT_BEFORE_IMAGE], image, words[TEXT_BEFORE_IMAGE:]]))
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    inputs = {"input_ids": ids, "attention_mask": mask, **image_inputs}
    if base.config.model_type == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (ids == placeholder).long()
    return describe_batch(base, to_model(inputs, base), sum(images))


def tokens_per_image(model: Any) -> int:
    """Return the number of multimodal tokens that one image of `make_batch` becomes."""
    vision: Any = base_model_of(model).config.vision_config
    if model.config.model_type == "qwen2_5_vl":
        merged_side: int = _patches(vision) // vision.spatial_merge_size
        return merged_side**2
    side: int = vision.image_size // vision.patch_size
    if model.config.model_type == "llava_next":
        height, width = GRID
        return side**2 + height * side * (width * side + 1)
    return side**2


def _patches(vision: Any) -> int:
    """Return the patches along a side of Qwen's image, fewer for a small vision tower."""
    return PATCHES if vision.hidden_size >= 1024 else 8


def _image_inputs(model: Any, images: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the inputs that hold `images` images of random pixels."""
    if not images:
        return {}
    vision = model.config.vision_config
    model_type = model.config.model_type
    if model_type == "qwen2_5_vl":
        side = _patches(vision)
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        grid = torch.tensor([[1, side, side]] * images)
        pixels = torch.randn(images * side * side, values, generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": grid}
    size = vision.image_size
    if model_type == "llava_next":
        height, width = GRID
        pixels = torch.randn(images, 1 + height * width, 3, size, size, generator=generator)
        sizes = torch.tensor([[height * size, width * size]] * images)
        return {"pixel_values": pixels, "image_sizes": sizes}
    if model_type == "llava":
        return {"pixel_values": torch.randn(images, 3, size, size, generator=generator)}
    raise ValueError(f"model type {model_type!r}: batches are made for llava, llava_next and qwen2_5_vl")
