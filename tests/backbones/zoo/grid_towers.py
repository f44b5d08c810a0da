"""Families of several houses whose vision towers take patches and their grid."""

from __future__ import annotations

from functools import partial
from typing import Any

import transformers as hf
from transformers import PreTrainedModel

from .family import LAYERS, PLACEHOLDER, TEXT, Family, Media, Refused
from .grids import SPECIAL, VIDEO, VISUAL, modalities, patched

WINDOWED: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": 32,
    "fullatt_block_indexes": [1],
    "window_size": 16,
}
"""A tower in which all but some layers attend within windows of the image."""

PLACEHOLDERS = {"image_token_id": PLACEHOLDER, "video_token_id": VIDEO}


def _hyperclovax() -> PreTrainedModel:
    text = {"model_type": "hyperclovax", **TEXT, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}
    vision = {"model_type": "qwen2_5_vl_vision", **WINDOWED}
    return hf.HyperCLOVAXVisionV2ForConditionalGeneration(
        hf.HyperCLOVAXVisionV2Config(text_config=text, vision_config=vision, **PLACEHOLDERS)
    )


def _hunyuan_vl() -> PreTrainedModel:
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1, 1]}
    text = {**TEXT, "head_dim": 8, "rope_parameters": rotary}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": 4,
        "max_image_size": 32,
        "out_hidden_size": 32,
    }
    return hf.HunYuanVLForConditionalGeneration(
        hf.HunYuanVLConfig(text_config=text, vision_config=vision, image_token_id=PLACEHOLDER)
    )


def _kimi_k25() -> PreTrainedModel:
    text = {
        "model_type": "deepseek_v3",
        **TEXT,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": 4,
        "pos_emb_height": 4,
        "pos_emb_width": 4,
    }
    config = hf.Kimi_K25Config(text_config=text, vision_config=vision, projection_hidden_size=32, **SPECIAL)
    return hf.Kimi_K25ForConditionalGeneration(config)


def _cosmos3_edge() -> PreTrainedModel:
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": 4,
        "num_patches": 16,
    }
    return hf.Cosmos3EdgeForConditionalGeneration(
        hf.Cosmos3EdgeConfig(
            text_config={**TEXT, "head_dim": 8, "rope_parameters": rotary},
            vision_config=vision,
            projector_hidden_size=32,
            **SPECIAL,
        )
    )


def _minimax(attention: str) -> PreTrainedModel:
    text = {
        **TEXT,
        "head_dim": 8,
        "rotary_dim": 4,
        "dense_intermediate_size": 48,
        "shared_intermediate_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1),
        "layer_types": ["full_attention"] + [attention] * (LAYERS - 1),
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    }
    return hf.MiniMaxM3SparseForConditionalGeneration(
        hf.MiniMaxM3VLConfig(
            text_config=text,
            vision_config=vision,
            projector_hidden_size=32,
            image_token_index=PLACEHOLDER,
            video_token_index=VIDEO,
        )
    )


_FLAT = 3 * 4 * 4
"""Numbers in a patch of a single frame."""


def _framed(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """A feature at the end of each row of patches, one before all and one behind."""
    media = patched(values=_FLAT)(model, seeds)
    counts = [
        rows // 2 * (columns // 2 + 1) + 2 for _, rows, columns in media.inputs["image_grid_thw"].tolist()
    ]
    return Media(media.inputs, [[PLACEHOLDER] * count for count in counts])


def _small_images(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Patches as small images instead of rows."""
    media = patched(values=_FLAT, wrapped=True)(model, seeds)
    pixels = media.inputs["pixel_values"].view(-1, 3, 4, 4)
    return Media(media.inputs | {"pixel_values": pixels}, media.tokens)


FAMILIES = [
    Family("hyperclovax_vision_v2", _hyperclovax, patched(), VISUAL),
    Family("hyperclovax_vision_v2-video", _hyperclovax, patched(videos=True), VISUAL),
    # The stock model counts images over the whole batch in its positions, so that a row with images depends
    # on the rows before it; a single row has them here.
    Family("hunyuan_vl", _hunyuan_vl, _framed, finish=modalities, rows=((2, 0, 3, 0, 2), (5,), (9,))),
    Family("kimi_k25", _kimi_k25, _small_images, VISUAL),
    Family("cosmos3_edge", _cosmos3_edge, patched(values=_FLAT, wrapped=True), VISUAL, modalities),
    Family(
        "cosmos3_edge-video",
        _cosmos3_edge,
        patched(videos=True, values=_FLAT, wrapped=True, frames_apart=True),
        VISUAL,
        modalities,
    ),
    Family(
        "minimax_m3_vl",
        partial(_minimax, "full_attention"),
        patched(wrapped=True),
        VISUAL,
        remark="with full attention in every layer; sparse layers are refused",
    ),
    Family(
        "minimax_m3_vl-video", partial(_minimax, "full_attention"), patched(videos=True, wrapped=True), VISUAL
    ),
]
REFUSED = [Refused("minimax_m3_vl (sparse)", partial(_minimax, "minimax_m3_sparse"), "minimax_m3_sparse")]
