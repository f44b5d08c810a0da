"""DeepSeek's vision models and Janus: square images, a second tower or tile for what is small in them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from .family import PLACEHOLDER, TEXT, VISION, Family, Media, Refused, flat, noise
from .llava_like import SIGLIP, square_images

LLAMA = {"model_type": "llama", **TEXT}

SAM: dict[str, Any] = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 48,
    "initializer_range": 0.02,
}
"""A second tower, for images of twice the height and width."""


def _deepseek_vl() -> PreTrainedModel:
    return hf.DeepseekVLForConditionalGeneration(
        hf.DeepseekVLConfig(text_config=LLAMA, vision_config=SIGLIP, image_token_id=PLACEHOLDER)
    )


def _deepseek_vl_hybrid() -> PreTrainedModel:
    return hf.DeepseekVLHybridForConditionalGeneration(
        hf.DeepseekVLHybridConfig(
            text_config=LLAMA,
            vision_config=SIGLIP,
            high_res_vision_config={"model_type": "sam_vision_model", **SAM},
            image_token_id=PLACEHOLDER,
        )
    )


EXPERTS: dict[str, Any] = {
    **TEXT,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
}


def _deepseek_ocr2() -> PreTrainedModel:
    tower = {**SAM, "image_size": 16, "patch_size": 2, "downsample_channels": [16, 32]}
    encoder = {**TEXT, "num_hidden_layers": 2}
    return hf.DeepseekOcr2ForConditionalGeneration(
        hf.DeepseekOcr2Config(
            text_config=EXPERTS,
            vision_config={"sam_config": tower, "encoder_config": encoder},
            image_token_id=PLACEHOLDER,
        )
    )


def _unlimited_ocr() -> PreTrainedModel:
    tower = {**SAM, "image_size": 16, "patch_size": 2, "downsample_channels": [16, 32]}
    encoder = {**VISION, "image_size": 16}
    return hf.UnlimitedOcrForConditionalGeneration(
        hf.UnlimitedOcrConfig(
            text_config={**EXPERTS, "sliding_window": 6},
            vision_config={"sam_config": tower, "encoder_config": encoder},
            image_token_id=PLACEHOLDER,
        )
    )


def _janus() -> PreTrainedModel:
    drawing = {
        "num_embeddings": 16,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "latent_channels": 8,
        "num_res_blocks": 1,
        "projection_dim": 32,
        "image_token_embed_dim": 32,
    }
    return hf.JanusForConditionalGeneration(
        hf.JanusConfig(
            text_config=LLAMA,
            vision_config={**VISION, "projection_dim": 32, "num_image_tokens": 4},
            vq_config=drawing,
            image_token_id=PLACEHOLDER,
        )
    )


def _two_resolutions(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of 16 x 16 pixels, four tokens each, and the same images of 32 x 32 pixels."""
    media = square_images(model, seeds)
    fine = [noise(seed + 50, 3, 32, 32) for seed in flat(seeds)]
    return Media(media.inputs | {"high_res_pixel_values": torch.stack(fine)}, media.tokens)


def _views(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of 16 x 16 pixels: 144 queries and a separator; 144 more for the tile that some have."""
    images = [noise(seed, 3, 16, 16) for seed in flat(seeds)]
    counts = [1 - seed % 2 for seed in flat(seeds)]
    inputs = {"pixel_values": torch.stack(images)}
    if any(counts):
        near = [noise(seed + 50, 3, 16, 16) for seed, count in zip(flat(seeds), counts, strict=True) if count]
        inputs |= {"pixel_values_local": torch.stack(near), "num_local_patches": torch.tensor(counts)}
    return Media(inputs, [[PLACEHOLDER] * (144 * (1 + count) + 1) for count in counts])


FAMILIES = [
    Family("deepseek_vl", _deepseek_vl, square_images),
    Family("deepseek_vl_hybrid", _deepseek_vl_hybrid, _two_resolutions),
    Family("deepseek_ocr2", _deepseek_ocr2, _views, rows=((3, 0, 4), (5,), (0, 6))),
    Family("janus", _janus, square_images, remark="Images understood, not drawn."),
]

REFUSED = [
    Refused("unlimited_ocr", _unlimited_ocr, "choose or keep their keys in a way of their own"),
]
