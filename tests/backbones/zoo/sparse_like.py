"""Dots 3 Note and Nemotron H Omni: chosen keys beside windows, state spaces beside attention; both hear."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from .family import PLACEHOLDER, TEXT, Family, Media, flat, noise

VIDEO, SOUND = PLACEHOLDER + 1, PLACEHOLDER + 2

LATENT: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "head_dim": 8,
    "v_head_dim": 8,
}


def _dots3_note() -> PreTrainedModel:
    text = {
        **TEXT,
        **LATENT,
        **{f"swa_{name}": value for name, value in LATENT.items()},
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "sliding_window": 6,
        "index_topk": 4,
        "index_head_dim": 8,
        "index_n_heads": 16,
        "moe_intermediate_size": 16,
        "shared_experts_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "patch_size": 4,
        "mlp_layer_types": ["dense"],
        "adapter_in_dim": 32,
        "adapter_out_dim": 32,
    }
    audio = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "feature_size": 8,
        "hop_length": 4,
        "downsample_hidden_size": 8,
        "adapter_input_size": 32,
        "adapter_out_dim": 32,
    }
    return hf.Dots3NoteForConditionalGeneration(
        hf.Dots3NoteConfig(
            text_config=text,
            vision_config=vision,
            audio_config=audio,
            image_token_id=PLACEHOLDER,
            video_token_id=VIDEO,
            audio_token_id=SOUND,
        )
    )


def _nemotron_h_omni() -> PreTrainedModel:
    text = {
        **{name: value for name, value in TEXT.items() if name != "num_hidden_layers"},
        "model_type": "nemotron_h",
        "layers_block_type": ["linear_attention", "full_attention", "moe", "linear_attention", "mlp"],
        "head_dim": 8,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 4,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "use_mamba_kernels": False,
    }
    vision = {
        "model_type": "radio",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "mlp_ratio": 1.5,
        "patch_size": 4,
        "image_size": 16,
        "max_img_size": 32,
        "num_cls_tokens": 1,
        "num_registers": 1,
        "video_temporal_patch_size": 2,
    }
    parts = hf.models.nemotron_h_omni
    return parts.NemotronH_Omni_Reasoning_V3(
        parts.NemotronH_Omni_Reasoning_V3_Config(
            text_config=text,
            vision_config=vision,
            audio_config={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_mel_bins": 8,
                "subsampling_conv_channels": 8,
                "subsampling_factor": 4,
                "conv_kernel_size": 3,
                "projection_hidden_size": 32,
                "projection_bias": False,
            },
            projector_hidden_size=32,
            vision_hidden_size=32,
            image_token_id=PLACEHOLDER,
            video_token_id=VIDEO,
            audio_token_id=SOUND,
        )
    )


def _grids(seeds: list[list[int]]) -> list[tuple[int, int]]:
    return [(4, 4 + 4 * (seed % 2)) for seed in flat(seeds)]


def _merged_patches(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of 4 x 4 or 4 x 8 patches of 4 x 4 pixels, 2 x 2 patches merged: four or eight tokens."""
    grids = _grids(seeds)
    pixels = [noise(seed, high * wide, 48) for seed, (high, wide) in zip(flat(seeds), grids, strict=True)]
    inputs = {"pixel_values": torch.cat(pixels)}
    if model.config.model_type == "nemotron_h_omni":
        inputs["image_grid_hw"] = torch.tensor(grids)
    else:
        inputs["image_grid_thw"] = torch.tensor([(1, *grid) for grid in grids])
    return Media(inputs, [[PLACEHOLDER] * (high * wide // 4) for high, wide in grids])


def _frames(seeds: list[list[int]], lengths: tuple[int, int]) -> tuple[list[int], torch.Tensor]:
    """Each sound's number of mel frames, one of `lengths`, and (sounds, most, 8) frames."""
    return [lengths[seed % 2] for seed in flat(seeds)], torch.stack(
        [noise(seed, max(lengths), 8) for seed in flat(seeds)]
    )


def _dots_sounds(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Sounds of 24 or 16 mel frames of four samples each: three or two tokens."""
    counts, frames = _frames(seeds, (24, 16))
    lengths = torch.tensor([4 * count for count in counts])
    inputs = {"input_features": frames.transpose(1, 2), "chunk_sample_lengths": lengths}
    return Media(inputs, [[SOUND] * (count // 8) for count in counts])


def _nemotron_sounds(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Sounds of 23 or 15 mel frames: six or four tokens."""
    counts, frames = _frames(seeds, (23, 15))
    mask = torch.stack([torch.arange(23) < count for count in counts])
    inputs = {"input_features": frames, "input_features_mask": mask}
    return Media(inputs, [[SOUND] * ((count + 1) // 4) for count in counts])


sparse = partial(Family, placeholders=frozenset({PLACEHOLDER, VIDEO, SOUND}))

FAMILIES = [
    sparse("dots3_note", _dots3_note, _merged_patches),
    sparse("dots3_note-audio", _dots3_note, _dots_sounds),
    sparse("nemotron_h_omni", _nemotron_h_omni, _merged_patches, deepest=5),
    sparse("nemotron_h_omni-audio", _nemotron_h_omni, _nemotron_sounds, deepest=5),
]
