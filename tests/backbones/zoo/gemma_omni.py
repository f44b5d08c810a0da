"""Gemma 3n and Gemma 4: per-layer inputs, layers that share keys, images of any shape, video, sound."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.gemma3n import modeling_gemma3n

from .family import PLACEHOLDER, TEXT, Family, Media, flat, noise

VIDEO, SOUND = PLACEHOLDER + 1, PLACEHOLDER + 2

SHARED: dict[str, Any] = {
    **TEXT,
    "num_hidden_layers": 6,
    "head_dim": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": TEXT["vocab_size"],
}
"""Layers 4 and 5 read the keys of layers 2 and 3."""

SPECIAL = {
    "image_token_id": PLACEHOLDER,
    "video_token_id": VIDEO,
    "audio_token_id": SOUND,
    "boi_token_id": 8,
    "eoi_token_id": 9,
    "boa_token_id": 10,
    "eoa_token_index": 11,
}

GEMMA4_SOUND = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "subsampling_conv_channels": [8, 4],
    "attention_chunk_size": 4,
    "attention_context_left": 5,
    "output_proj_dims": 32,
}


def _gemma3n() -> PreTrainedModel:
    audio = {
        "input_feat_size": 8,
        "hidden_size": 32,
        "conf_attention_chunk_size": 4,
        "conf_attention_context_left": 5,
        "conf_num_attention_heads": 4,
        "conf_num_hidden_layers": 1,
        "conf_reduction_factor": 2,
        "sscp_conv_channel_size": (8, 4),
        "vocab_size": 2,
        "vocab_offset": TEXT["vocab_size"] + 2,
    }
    config = hf.Gemma3nConfig(
        text_config={
            "model_type": "gemma3n_text",
            **SHARED,
            "vocab_size": TEXT["vocab_size"] + 4,
            "laurel_rank": 4,
        },
        vision_config={"hidden_size": 32, "vocab_size": 2, "vocab_offset": TEXT["vocab_size"]},
        audio_config=audio,
        audio_soft_tokens_per_image=5,
        **SPECIAL,
    )
    stock = modeling_gemma3n.AutoModel.from_config

    def without_vision(part: Any) -> Any:
        return torch.nn.Identity() if part is config.vision_config else stock(part)

    with mock.patch.object(modeling_gemma3n.AutoModel, "from_config", without_vision):
        return hf.Gemma3nForConditionalGeneration(config)


def _gemma4(experts: bool = False) -> PreTrainedModel:
    more = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    return hf.Gemma4ForConditionalGeneration(
        hf.Gemma4Config(
            text_config={
                "model_type": "gemma4_text",
                **SHARED,
                "use_bidirectional_attention": "vision",
                "use_double_wide_mlp": True,
                "global_head_dim": 16,
                **(more if experts else {}),
            },
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "pooling_kernel_size": 2,
                "patch_size": 4,
                "position_embedding_size": 8,
            },
            audio_config=GEMMA4_SOUND,
            **SPECIAL,
        )
    )


def _gemma4_unified() -> PreTrainedModel:
    return hf.Gemma4UnifiedForConditionalGeneration(
        hf.Gemma4UnifiedConfig(
            text_config={
                **TEXT,
                "head_dim": 8,
                "sliding_window": 6,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "attention_k_eq_v": True,
                "global_head_dim": 16,
                "num_global_key_value_heads": 1,
            },
            vision_config={
                "patch_size": 4,
                "pooling_kernel_size": 1,
                "mm_embed_dim": 32,
                "mm_posemb_size": 8,
                "output_proj_dims": 32,
            },
            audio_config={"audio_embed_dim": 16},
            **SPECIAL,
        )
    )


def _frame(seed: int) -> tuple[Tensor, Tensor]:
    """(16, 48) patches of 4 x 4 pixels and (16, 2) their places: 4 x 4 or 2 x 4 patches, then padding."""
    wide = 4 - 2 * (seed % 2)
    place = torch.full((16, 2), -1)
    place[: 4 * wide] = torch.tensor([[x, y] for y in range(4) for x in range(wide)])
    patches = noise(seed, 16, 48).masked_fill(place[:, :1] < 0, 0.0)
    return patches, place


def _patches(model: PreTrainedModel, seeds: list[list[int]], pooled: int = 4) -> Media:
    """Images of 16 or 8 patches, of which `pooled` become one token."""
    frames = [_frame(seed) for seed in flat(seeds)]
    inputs = {
        "pixel_values": torch.stack([patches for patches, _ in frames]),
        "image_position_ids": torch.stack([place for _, place in frames]),
    }
    return Media(inputs, [[PLACEHOLDER] * ((16 - 8 * (seed % 2)) // pooled) for seed in flat(seeds)])


def _clips(model: PreTrainedModel, seeds: list[list[int]], pooled: int = 4) -> Media:
    """Videos of one frame of 16 patches or two of eight."""
    counts = [1 + seed % 2 for seed in flat(seeds)]
    frames = [_frame(seed + 10_000 * 2 * n) for seed in flat(seeds) for n in range(1 + seed % 2)]
    inputs = {
        "pixel_values_videos": torch.stack([patches for patches, _ in frames]),
        "video_position_ids": torch.stack([place for _, place in frames]),
        "num_frames_per_video": torch.tensor(counts),
    }
    return Media(inputs, [[VIDEO] * (16 // pooled) for _ in counts])


def _sounds(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Sounds of 32 or 20 mel frames: eight or five tokens."""
    frames = [32 - 12 * (seed % 2) for seed in flat(seeds)]
    mask = torch.stack([torch.arange(32) < count for count in frames])
    features = torch.stack([noise(seed, 32, 8) for seed in flat(seeds)])
    inputs = {"input_features": features, "input_features_mask": mask}
    return Media(inputs, [[SOUND] * (count // 4) for count in frames])


def _waves(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Sounds of six or four stretches of a wave, one token each."""
    counts = [6 - 2 * (seed % 2) for seed in flat(seeds)]
    mask = torch.stack([torch.arange(6) < count for count in counts])
    features = torch.stack([noise(seed, 6, 16) for seed in flat(seeds)])
    return Media({"input_features": features, "input_features_mask": mask}, [[SOUND] * n for n in counts])


def _same_long_sounds(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Sounds of 32 or 20 mel frames, filled up to five tokens each."""
    sounds = _sounds(model, seeds)
    return Media(sounds.inputs, [[SOUND] * 5 for _ in sounds.tokens])


def _typed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """1 for an image's tokens, 2 for a video's, 3 for a sound's, 0 for others."""
    ids = inputs["input_ids"]
    kinds = sum((ids == PLACEHOLDER + kind).long() * (kind + 1) for kind in range(3))
    return inputs | {"mm_token_type_ids": torch.as_tensor(kinds)}


SHARING = (
    "Some layers read the keys of an earlier one, so that the deepest insert layer is the first that is read."
)
PLACEHOLDERS = frozenset({PLACEHOLDER, VIDEO, SOUND})
gemma4 = partial(Family, placeholders=PLACEHOLDERS, finish=_typed, scale=3.0, deepest=2, remark=SHARING)
unified = partial(Family, placeholders=PLACEHOLDERS, finish=_typed)

FAMILIES = [
    Family(
        "gemma3n-audio",
        _gemma3n,
        _same_long_sounds,
        placeholders=PLACEHOLDERS,
        deepest=2,
        without={"checkpoint": "the stock class cannot be loaded without its vision tower, which needs timm"},
        remark=SHARING,
    ),
    gemma4("gemma4", _gemma4, _patches),
    gemma4("gemma4-video", partial(_gemma4, experts=True), _clips),
    gemma4("gemma4-audio", _gemma4, _sounds),
    unified("gemma4_unified", _gemma4_unified, partial(_patches, pooled=1)),
    unified("gemma4_unified-video", _gemma4_unified, partial(_clips, pooled=1)),
    unified("gemma4_unified-audio", _gemma4_unified, _waves),
]
