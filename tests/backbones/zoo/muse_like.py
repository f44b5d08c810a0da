"""Muse: windows of attention, layers without positions, images as rows of patches; Spark also hears."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from .family import PLACEHOLDER, TEXT, Family, Media, flat, noise
from .grids import patched

VIDEO, SOUND = PLACEHOLDER + 1, PLACEHOLDER + 2

WINDOWED: dict[str, Any] = {
    **TEXT,
    "head_dim": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "layer_rope_theta": [10000.0, 0, 10000.0, 0],
}

VISION: dict[str, Any] = {
    "patch_size": 4,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "layer_types": ["window_attention", "full_attention"],
}

SPECIAL: dict[str, Any] = {
    "image_token_id": PLACEHOLDER,
    "video_token_id": VIDEO,
    "out_hidden_size": 128,
    "projector_hidden_size": 32,
}

patched_images = patched()


def _glimmer() -> PreTrainedModel:
    return hf.MuseGlimmerForConditionalGeneration(
        hf.MuseGlimmerConfig(text_config=WINDOWED, vision_config=VISION, **SPECIAL)
    )


def _spark() -> PreTrainedModel:
    experts = {
        "moe_intermediate_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_hidden_size": 16,
        "mlp_layer_types": ["dense", "sparse"] * 2,
    }
    audio = {
        "patch_sizes": (4, 2),
        "hidden_sizes": (16, 32),
        "depths": (1, 1),
        "num_hidden_layers": 2,
        "conv_kernel_size": 3,
        "out_hidden_size": 32,
    }
    return hf.MuseSparkForConditionalGeneration(
        hf.MuseSparkConfig(
            text_config=WINDOWED | experts,
            vision_config=VISION,
            audio_config=audio,
            audio_token_id=SOUND,
            **SPECIAL,
        )
    )


def _videos(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Videos of one or two times 4 x 4 patches, four tokens per time step."""
    grids = [(1 + seed % 2, 4, 4) for seed in flat(seeds)]
    pixels = [noise(seed, 16 * times, 96) for seed, (times, _, _) in zip(flat(seeds), grids, strict=True)]
    inputs = {"pixel_values_videos": torch.cat(pixels), "video_grid_thw": torch.tensor(grids)}
    return Media(inputs, [[VIDEO] * (4 * times) for times, _, _ in grids])


def _waves(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Sounds of 48 or 30 samples, one token per eight."""
    counts = [48 - 18 * (seed % 2) for seed in flat(seeds)]
    mask = torch.stack([(torch.arange(48) < count).long() for count in counts])
    values = torch.stack([noise(seed, 48) for seed in flat(seeds)]) * mask
    inputs = {"input_values": values, "input_values_mask": mask}
    return Media(inputs, [[SOUND] * -(-count // 8) for count in counts])


def _pictures_and_sounds(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Each image followed by a sound."""
    pictures, sounds = patched()(model, seeds), _waves(model, seeds)
    tokens = [picture + sound for picture, sound in zip(pictures.tokens, sounds.tokens, strict=True)]
    return Media(pictures.inputs | sounds.inputs, tokens)


muse = partial(Family, placeholders=frozenset({PLACEHOLDER, VIDEO, SOUND}))

FAMILIES = [
    muse("muse_glimmer", _glimmer, patched()),
    muse("muse_glimmer-video", _glimmer, _videos),
    muse("muse_spark", _spark, patched()),
    muse("muse_spark-audio", _spark, _pictures_and_sounds),
]
