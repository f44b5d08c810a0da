"""MiniCPM: packed patches, slices beside a thumbnail, a Qwen3.5 decoder."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from .family import PLACEHOLDER, TEXT, Family, Media, flat, noise
from .grids import END, START, VIDEO, VISUAL, modalities
from .qwen_like import LINEAR

SLICE_START = PLACEHOLDER + 4
SLICE_END = PLACEHOLDER + 5
_PATCH = 4


def _sizes(**special: int) -> dict[str, Any]:
    return {
        "text_config": {"model_type": "qwen3_5_text", **TEXT, **LINEAR},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": _PATCH,
        },
        "insert_layer_id": 0,
        "image_token_id": PLACEHOLDER,
        "video_token_id": VIDEO,
        **special,
    }


def _ocr() -> PreTrainedModel:
    return hf.MiniCPMOcrForConditionalGeneration(hf.MiniCPMOcrConfig(**_sizes()))


def _v4_6() -> PreTrainedModel:
    return hf.MiniCPMV4_6ForConditionalGeneration(hf.MiniCPMV4_6Config(**_sizes()))


def _v4_7() -> PreTrainedModel:
    markers = {
        "image_start_id": START,
        "image_end_id": END,
        "slice_start_id": SLICE_START,
        "slice_end_id": SLICE_END,
        "newline_id": SLICE_END + 1,
    }
    return hf.MiniCPMV4_7ForConditionalGeneration(hf.MiniCPMV4_7Config(**_sizes(**markers)))


def _sliced(model: PreTrainedModel, seeds: list[list[int]], videos: bool = False) -> Media:
    """Thumbnails of four tokens, every other one with two slices of two tokens each.

    With `videos`, odd seeds become two frames without slices.
    """
    merged = 2 if model.config.downsample_mode == "4x" else 4
    packed: dict[str, list[Tensor]] = {}
    tokens = []
    for seed in flat(seeds):
        video = videos and seed % 2 == 1
        sliced = not video and seed // (2 if videos else 1) % 2 == 1
        place, kind = (VIDEO, "_videos") if video else (PLACEHOLDER, "")
        run = [START, *[place] * 4, END]
        crops = [(2, 2)]
        if video:
            run, crops = run * 2, crops * 2
        if sliced:
            run, crops = [*run, *[SLICE_START, place, place, SLICE_END] * 2], [*crops, (2, 1), (2, 1)]
        sizes = torch.tensor(crops) * merged
        packed.setdefault(f"target_sizes{kind}", []).append(sizes)
        count = int(sizes.prod(dim=1).sum())
        packed.setdefault(f"pixel_values{kind}", []).append(noise(seed, 1, 3, _PATCH, _PATCH * count))
        tokens.append(run)
    joined = {name: torch.cat(parts, dim=-1 if "pixel" in name else 0) for name, parts in packed.items()}
    return Media(joined, tokens)


_videos = partial(_sliced, videos=True)

FAMILIES = [
    Family("minicpm_ocr", _ocr, _sliced, VISUAL),
    Family("minicpm_ocr-video", _ocr, _videos, VISUAL),
    Family("minicpmv4_6", _v4_6, _sliced, VISUAL),
    Family("minicpmv4_6-video", _v4_6, _videos, VISUAL),
    Family("minicpmv4_7", _v4_7, _sliced, VISUAL, modalities),
    Family("minicpmv4_7-video", _v4_7, _videos, VISUAL, modalities),
]
