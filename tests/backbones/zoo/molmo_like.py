"""Molmo 2 and Step 3.7: images cut into crops whose features are pooled or shortened by convolutions."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from .family import PLACEHOLDER, TEXT, VISION, Family, Media, flat, noise, token_types

HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}


def _molmo2() -> PreTrainedModel:
    return hf.Molmo2ForConditionalGeneration(
        hf.Molmo2Config(
            text_config={**TEXT, "head_dim": 8, "additional_vocab_size": 4, "rope_scaling_layers": [1, 3]},
            vision_config={
                **HEADS,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "image_size": [16, 16],
                "patch_size": 4,
            },
            adapter_config={
                **HEADS,
                "vision_feature_layer": [1, 0],
                "hidden_size": 32,
                "intermediate_size": 48,
                "text_hidden_size": 32,
            },
            image_patch_id=PLACEHOLDER,
            image_start_token_id=PLACEHOLDER + 1,
            image_end_token_id=PLACEHOLDER + 2,
            low_res_image_start_token_id=PLACEHOLDER + 3,
            frame_start_token_id=PLACEHOLDER + 4,
            frame_end_token_id=PLACEHOLDER + 5,
        )
    )


def _step3p7() -> PreTrainedModel:
    return hf.Step3p7ForConditionalGeneration(
        hf.Step3p7Config(
            text_config={
                **TEXT,
                "head_dim": 8,
                "sliding_window": 6,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "num_sliding_attention_heads": 2,
                "mlp_layer_types": ["dense", "sparse"] * 2,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 16,
                "share_expert_dim": 16,
            },
            vision_config={**VISION, "patch_size": 2, "mlp_ratio": 1.5, "max_position_embeddings": 64},
            image_token_id=PLACEHOLDER,
        )
    )


def _pooled(first: int, crops: int) -> Tensor:
    """(4 x crops, 4) which patches, counted from `first`, each token of a crop pools: 2 x 2 of its 4 x 4."""
    patch = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    return torch.cat([first + 16 * crop + patch for crop in range(crops)])


def _crops(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images as a whole, and every second one with a further crop: four tokens each."""
    counts = [1 + seed % 2 for seed in flat(seeds)]
    pixels = [noise(seed, 1 + seed % 2, 16, 48) for seed in flat(seeds)]
    firsts = [16 * sum(counts[:image]) for image in range(len(counts))]
    pooling = [_pooled(first, count) for first, count in zip(firsts, counts, strict=True)]
    inputs = {
        "pixel_values": torch.cat(pixels),
        "image_token_pooling": torch.cat(pooling),
        "image_grids": torch.tensor([[2, 2, 2 * (count - 1), 2] for count in counts]),
        "image_num_crops": torch.tensor(counts),
    }
    tokens = [[PLACEHOLDER + 3] + [PLACEHOLDER] * 4 * count + [PLACEHOLDER + 2] for count in counts]
    return Media(inputs, tokens)


def _clips(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Videos of one or two frames, four tokens each."""
    counts = [1 + seed % 2 for seed in flat(seeds)]
    pixels = [noise(seed, 1 + seed % 2, 16, 48) for seed in flat(seeds)]
    inputs = {
        "pixel_values_videos": torch.cat(pixels),
        "video_token_pooling": _pooled(0, sum(counts)),
        "video_grids": torch.tensor([[count, 2, 2] for count in counts]),
    }
    frame = [PLACEHOLDER + 4] + [PLACEHOLDER] * 4 + [PLACEHOLDER + 5]
    return Media(inputs, [frame * count for count in counts])


def _views(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of four tokens, every second one with a local view of four more before them."""
    pixels = torch.stack([noise(seed, 3, 16, 16) for seed in flat(seeds)])
    counts = [seed % 2 for seed in flat(seeds)]
    inputs = {"pixel_values": pixels, "num_local_patches": torch.tensor(counts)}
    local = [noise(10_000 + seed, 3, 16, 16) for seed in flat(seeds) if seed % 2]
    if local:
        inputs["pixel_values_local"] = torch.stack(local)
    return Media(inputs, [[PLACEHOLDER] * (4 + 4 * count) for count in counts])


FAMILIES = [
    Family("molmo2", _molmo2, _crops, finish=token_types),
    Family("molmo2-video", _molmo2, _clips, finish=token_types),
    Family("step3p7", _step3p7, _views),
]
