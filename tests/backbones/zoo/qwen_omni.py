"""The Omni families: images, videos and sounds in one prompt."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from .deepstack import DEEP_VISION
from .family import PLACEHOLDER, TEXT, Family, Media, Refused, noise
from .grids import END, START, VIDEO, patched
from .qwen_like import EXPERTS, INTERLEAVED, ROTARY, VISION

AUDIO = PLACEHOLDER + 4
AUDIO_START = PLACEHOLDER + 5
AUDIO_END = PLACEHOLDER + 6
_FRAMES = 32
_ALL = frozenset({PLACEHOLDER, VIDEO, AUDIO})

_AUDIO_TOWER: dict[str, Any] = {
    "num_mel_bins": 8,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "max_source_positions": 32,
    "n_window": 8,
    "output_dim": 32,
}


def _thinker(**extra: Any) -> Any:
    return hf.Qwen2_5OmniThinkerConfig(
        text_config={**TEXT, "rope_parameters": ROTARY},
        vision_config={**VISION, "fullatt_block_indexes": [1], "window_size": 16},
        audio_config=_AUDIO_TOWER,
        image_token_index=PLACEHOLDER,
        video_token_index=VIDEO,
        audio_token_index=AUDIO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        audio_start_token_id=AUDIO_START,
        audio_end_token_id=AUDIO_END,
        **extra,
    )


def _qwen2_5_omni_thinker() -> PreTrainedModel:
    return hf.Qwen2_5OmniThinkerForConditionalGeneration(_thinker())


def _qwen2_5_omni() -> PreTrainedModel:
    config = hf.Qwen2_5OmniConfig(thinker_config=_thinker().to_dict(), enable_audio_output=False)
    return hf.Qwen2_5OmniForConditionalGeneration(config)


def _moe_thinker() -> Any:
    audio = {**_AUDIO_TOWER, "n_window": 50, "downsample_hidden_size": 8}
    return hf.Qwen3OmniMoeThinkerConfig(
        text_config={**TEXT, **EXPERTS, "rope_parameters": INTERLEAVED, "mlp_only_layers": [1]},
        vision_config=DEEP_VISION,
        audio_config=audio,
        image_token_id=PLACEHOLDER,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        audio_start_token_id=AUDIO_START,
        audio_end_token_id=AUDIO_END,
    )


def _qwen3_omni_moe_thinker() -> PreTrainedModel:
    return hf.Qwen3OmniMoeThinkerForConditionalGeneration(_moe_thinker())


def _qwen3_omni_moe() -> PreTrainedModel:
    config = hf.Qwen3OmniMoeConfig(thinker_config=_moe_thinker().to_dict(), enable_audio_output=False)
    return hf.Qwen3OmniMoeForConditionalGeneration(config)


def _with_seconds(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images and videos, and how many seconds a frame of each video takes."""
    media = patched(videos=True, wrapped=True)(model, seeds)
    inputs = dict(media.inputs)
    if "video_grid_thw" in inputs:
        inputs["video_second_per_grid"] = torch.full((len(inputs["video_grid_thw"]),), 0.08)
    return Media(inputs, media.tokens)


def with_sounds(lengths: tuple[int, int], tokens: dict[int, int]) -> Any:
    """Images at even seeds and sounds at odd ones; `tokens` says how many a number of mel frames becomes."""

    def media(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
        flat = [seed for row in seeds for seed in row]
        sounds = [seed for seed in flat if seed % 2]
        images = patched(wrapped=True)(model, [[2 * seed for seed in flat if not seed % 2]])
        pending = iter(images.tokens)
        inputs: dict[str, Tensor] = dict(images.inputs)
        runs = []
        counts = {seed: lengths[seed // 2 % 2] for seed in sounds}
        for seed in flat:
            runs.append(
                [AUDIO_START, *[AUDIO] * tokens[counts[seed]], AUDIO_END] if seed % 2 else next(pending)
            )
        if sounds:
            inputs["input_features"] = torch.stack([noise(seed, 8, _FRAMES) for seed in sounds])
            inputs["feature_attention_mask"] = torch.stack(
                [(torch.arange(_FRAMES) < counts[seed]).long() for seed in sounds]
            )
        return Media(inputs, runs)

    return media


FAMILIES = [
    Family("qwen2_5_omni_thinker", _qwen2_5_omni_thinker, patched(wrapped=True), _ALL),
    Family("qwen2_5_omni_thinker-video", _qwen2_5_omni_thinker, _with_seconds, _ALL),
    Family(
        "qwen2_5_omni_thinker-audio",
        _qwen2_5_omni_thinker,
        with_sounds((32, 20), {32: 8, 20: 5}),
        _ALL,
        remark="sounds and images in one prompt",
    ),
    Family("qwen3_omni_moe_thinker", _qwen3_omni_moe_thinker, patched(wrapped=True), _ALL),
    Family("qwen3_omni_moe_thinker-video", _qwen3_omni_moe_thinker, _with_seconds, _ALL),
    Family(
        "qwen3_omni_moe_thinker-audio",
        _qwen3_omni_moe_thinker,
        with_sounds((32, 20), {32: 4, 20: 3}),
        _ALL,
        remark="sounds and images in one prompt",
    ),
]
REFUSED = [
    Refused("qwen2_5_omni", _qwen2_5_omni, "thinker"),
    Refused("qwen3_omni_moe", _qwen3_omni_moe, "thinker"),
]
