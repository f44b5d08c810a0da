"""LLaVA's relatives that take videos: frame by frame through an image tower, then pooled."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from .family import PLACEHOLDER, TEXT, Family, Media, flat, noise
from .llava_like import CLIP, llava_onevision, square_images, tiled_images

VIDEO = PLACEHOLDER + 1
BOTH = frozenset({PLACEHOLDER, VIDEO})

MediaOf = Callable[[PreTrainedModel, list[list[int]]], Media]

IDS = {"image_token_id": PLACEHOLDER, "video_token_id": VIDEO}


def either(even: MediaOf, odd: MediaOf) -> MediaOf:
    """One kind of media for even seeds and another for odd ones, so that a batch holds both."""

    def media(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
        inputs: dict[str, Tensor] = {}
        tokens: dict[int, list[int]] = {}
        for parity, kind in enumerate((even, odd)):
            own = [seed for seed in flat(seeds) if seed % 2 == parity]
            if own:
                made = kind(model, [own])
                inputs |= made.inputs
                tokens |= dict(zip(own, made.tokens, strict=True))
        return Media(inputs, [tokens[seed] for seed in flat(seeds)])

    return media


def _llava_next_video() -> PreTrainedModel:
    return hf.LlavaNextVideoForConditionalGeneration(
        hf.LlavaNextVideoConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config=CLIP,
            image_grid_pinpoints=[[16, 32], [32, 16]],
            **IDS,
        )
    )


def _video_llava() -> PreTrainedModel:
    return hf.VideoLlavaForConditionalGeneration(
        hf.VideoLlavaConfig(text_config={"model_type": "llama", **TEXT}, vision_config=CLIP, **IDS)
    )


def _video_llama_3() -> PreTrainedModel:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": 4,
    }
    return hf.VideoLlama3ForConditionalGeneration(
        hf.VideoLlama3Config(text_config={"model_type": "qwen2", **TEXT}, vision_config=vision, **IDS)
    )


def _frames(seeds: list[list[int]], tokens: int) -> Media:
    videos = [noise(seed, 3, 3, 16, 16) for seed in flat(seeds)]
    return Media({"pixel_values_videos": torch.stack(videos)}, [[VIDEO] * tokens for _ in videos])


def _pooled_frames(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Videos of three frames, one token each."""
    return _frames(seeds, 3)


def _ended_frames(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Videos of three frames, one token each, and a newline feature."""
    return _frames(seeds, 4)


def _whole_frames(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Videos of three frames: four patches and the class feature each."""
    return _frames(seeds, 15)


def _patches(grids: list[tuple[int, int, int]], seeds: list[int]) -> Tensor:
    return torch.cat(
        [
            noise(seed, t * rows * columns, 3 * 4 * 4)
            for seed, (t, rows, columns) in zip(seeds, grids, strict=True)
        ]
    )


def _any_size_images(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of 2 x 2 or 2 x 4 patches, one token each."""
    grids = [(1, 2, 2 + 2 * (seed % 2)) for seed in flat(seeds)]
    inputs = {
        "pixel_values": _patches(grids, flat(seeds)),
        "image_grid_thw": torch.tensor(grids),
        "image_merge_sizes": torch.ones(len(grids), dtype=torch.long),
    }
    return Media(inputs, [[PLACEHOLDER] * (rows * columns) for _, rows, columns in grids])


def _compressed_videos(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Videos of two or three frames of 4 x 4 patches, four tokens each, of which the processor drops some."""
    grids = [(2 + seed % 2, 4, 4) for seed in flat(seeds)]
    kept = [noise(seed, 4 * frames) > -0.5 for seed, (frames, _, _) in zip(flat(seeds), grids, strict=True)]
    inputs = {
        "pixel_values_videos": _patches(grids, flat(seeds)),
        "video_grid_thw": torch.tensor(grids),
        "video_merge_sizes": torch.full((len(grids),), 2),
        "video_compression_mask": torch.cat(kept),
    }
    return Media(inputs, [[VIDEO] * int(mask.sum()) for mask in kept])


FAMILIES = [
    Family("llava_next_video", _llava_next_video, tiled_images),
    Family("llava_next_video-video", _llava_next_video, either(tiled_images, _pooled_frames), BOTH),
    Family("llava_onevision-video", llava_onevision, either(tiled_images, _ended_frames), BOTH),
    Family("video_llava", _video_llava, square_images),
    Family("video_llava-video", _video_llava, either(square_images, _whole_frames), BOTH),
    Family("video_llama_3", _video_llama_3, _any_size_images),
    Family("video_llama_3-video", _video_llama_3, either(_any_size_images, _compressed_videos), BOTH),
]
