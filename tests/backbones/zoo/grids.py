"""Images and videos that models take as rows of patches beside a grid of time, height and width."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .family import PLACEHOLDER, Media, flat, noise

VIDEO = PLACEHOLDER + 1
START = PLACEHOLDER + 2
END = PLACEHOLDER + 3
FRAME_TIME = 19
"""A text token between the frames of a video, where a processor writes the time."""

VISUAL = frozenset({PLACEHOLDER, VIDEO})

SPECIAL = {
    "image_token_id": PLACEHOLDER,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}

PatchMedia = Callable[[PreTrainedModel, list[list[int]]], Media]


def patched(
    *,
    images: bool = True,
    videos: bool = False,
    values: int = 3 * 2 * 4 * 4,
    wrapped: bool = False,
    frames_apart: bool = False,
    frame_token: int = VIDEO,
    frames_merged: int = 1,
) -> PatchMedia:
    """Makes images of 4 x 4 or 4 x 8 patches with `values` numbers each, 2 x 2 patches merged into a token.

    With `videos`, odd seeds become videos of two or four frames of 4 x 4 patches, so that a batch holds both;
    without `images`, all do.
    `wrapped` puts start and end tokens around; `frames_apart` gives each frame of a video its own run, after
    a token for its time; a frame's tokens are `frame_token`s, one run for every `frames_merged` frames.
    """

    def wrap(tokens: list[int]) -> list[int]:
        return [START, *tokens, END] if wrapped else tokens

    def media(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
        inputs: dict[str, list[Tensor]] = {}
        tokens = []
        for seed in flat(seeds):
            large = (seed // 2) % 2
            if videos and (seed % 2 or not images):
                frames, rows, columns = 2 + 2 * large, 4, 4
                names = "pixel_values_videos", "video_grid_thw"
                run = [frame_token] * (rows * columns // 4)
                count = frames // frames_merged
                tokens.append(
                    [token for _ in range(count) for token in [FRAME_TIME, *wrap(run)]]
                    if frames_apart
                    else wrap(run * count)
                )
            else:
                frames, rows, columns = 1, 4, 4 + 4 * (large if videos else seed % 2)
                names = "pixel_values", "image_grid_thw"
                tokens.append(wrap([PLACEHOLDER] * (rows * columns // 4)))
            inputs.setdefault(names[0], []).append(noise(seed, frames * rows * columns, values))
            inputs.setdefault(names[1], []).append(torch.tensor([[frames, rows, columns]]))
        return Media({name: torch.cat(parts) for name, parts in inputs.items()}, tokens)

    return media


def modalities(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add token types: 0 for text, 1 for an image, 2 for a video. Some families need it as `finish`."""
    ids = inputs["input_ids"]
    return inputs | {"mm_token_type_ids": (ids == PLACEHOLDER).long() + 2 * (ids == VIDEO).long()}
