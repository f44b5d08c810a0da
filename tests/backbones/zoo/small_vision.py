"""Models with towers of their own: feature maps, visual words, queries over patches, mixtures of experts."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from .family import PLACEHOLDER, TEXT, VISION, Family, Media, flat, noise
from .llava_like import SIGLIP, square_images
from .llava_video import BOTH, VIDEO, either

INDICATORS = list(range(PLACEHOLDER + 1, PLACEHOLDER + 6))
"""Ovis: image start and end, and what stands around the tiles; learned, the same in every image."""


def _fast_vlm() -> PreTrainedModel:
    """With a ResNet for the feature map, as FastViT needs the `timm` package."""
    tower = {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
        "hidden_size": 16,
    }
    return hf.FastVlmForConditionalGeneration(
        hf.FastVlmConfig(
            text_config={"model_type": "qwen2", **TEXT}, vision_config=tower, image_token_id=PLACEHOLDER
        )
    )


def _perception_lm() -> PreTrainedModel:
    """With a SigLIP tower, as the perception encoder needs the `timm` package."""
    return hf.PerceptionLMForConditionalGeneration(
        hf.PerceptionLMConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config={**SIGLIP, "patch_size": 4, "model_args": {"embed_dim": 32}},
            vision_use_cls_token=False,
            projector_pooling_ratio=2,
            image_token_id=PLACEHOLDER,
            video_token_id=VIDEO,
        )
    )


def _ovis2() -> PreTrainedModel:
    tower = {**VISION, "vocab_size": 24, "hidden_stride": 2, "patch_size": 4}
    return hf.Ovis2ForConditionalGeneration(
        hf.Ovis2Config(
            text_config={"model_type": "qwen2", **TEXT},
            vision_config=tower,
            image_token_id=PLACEHOLDER,
            visual_indicator_token_ids=INDICATORS,
            vocab_size=TEXT["vocab_size"],
            hidden_size=TEXT["hidden_size"],
        )
    )


def _aria() -> PreTrainedModel:
    text: dict[str, Any] = {**TEXT, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    return hf.AriaForConditionalGeneration(
        hf.AriaConfig(
            text_config=text,
            vision_config={"model_type": "idefics3_vision", **VISION, "patch_size": 4},
            projector_patch_to_query_dict={16: 5},
            image_token_id=PLACEHOLDER,
        )
    )


def _feature_maps(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of 16 x 16 pixels, four places of the feature map each."""
    images = [noise(seed, 3, 16, 16) for seed in flat(seeds)]
    return Media({"pixel_values": torch.stack(images)}, [[PLACEHOLDER] * 4 for _ in images])


def _tiled(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of two tiles, four tokens each."""
    images = [noise(seed, 2, 3, 16, 16) for seed in flat(seeds)]
    return Media({"pixel_values": torch.stack(images)}, [[PLACEHOLDER] * 8 for _ in images])


def _frames(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Videos of three frames, four tokens each."""
    videos = [noise(seed, 3, 3, 16, 16) for seed in flat(seeds)]
    return Media({"pixel_values_videos": torch.stack(videos)}, [[VIDEO] * 12 for _ in videos])


def _between_indicators(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of 16 x 16 pixels: four tokens between indicators, of which larger images have more."""
    media = square_images(model, seeds)
    start, end, column, row, _ = INDICATORS
    more = [[column, row] if seed % 2 else [column] for seed in flat(seeds)]
    tokens = [[start, *image, *extra, end] for image, extra in zip(media.tokens, more, strict=True)]
    return Media(media.inputs, tokens)


def _masked_images(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of 16 x 16 or 16 x 8 pixels, the latter padded: five queries each."""
    images = [noise(seed, 3, 16, 16) for seed in flat(seeds)]
    masks = torch.ones(len(images), 16, 16, dtype=torch.bool)
    for mask, seed in zip(masks, flat(seeds), strict=True):
        mask[:, 16 - 8 * (seed % 2) :] = False
    inputs = {"pixel_values": torch.stack(images), "pixel_mask": masks}
    return Media(inputs, [[PLACEHOLDER] * 5 for _ in images])


FAMILIES = [
    Family("fast_vlm", _fast_vlm, _feature_maps),
    Family("perception_lm", _perception_lm, _tiled),
    Family("perception_lm-video", _perception_lm, either(_tiled, _frames), BOTH),
    Family(
        "ovis2",
        _ovis2,
        _between_indicators,
        remark="Visual indicators are learned and the same for every image: they count as text.",
    ),
    Family("aria", _aria, _masked_images),
]
