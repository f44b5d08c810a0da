"""Families that the zoo does not hold yet, written as it writes them, for the tests of costs."""

from __future__ import annotations

import torch
from transformers import (
    AriaConfig,
    AriaForConditionalGeneration,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from zoo.family import LAYERS, PLACEHOLDER, TEXT, VISION, Family, Media, flat, noise, token_types

SMALL_PATCHES = {**VISION, "patch_size": 4}
"""16 patches an image, for families that merge four of them into one token."""


def _qwen2_vl() -> PreTrainedModel:
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {**TEXT, "rope_parameters": rotary}
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4,
    }  # fmt: skip
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=PLACEHOLDER)
    )


def _internvl() -> PreTrainedModel:
    return InternVLForConditionalGeneration(
        InternVLConfig(
            text_config={"model_type": "qwen2", **TEXT},
            vision_config={**SMALL_PATCHES, "image_size": [16, 16], "patch_size": [4, 4]},
            image_token_id=PLACEHOLDER,
        )
    )


def _idefics3() -> PreTrainedModel:
    return Idefics3ForConditionalGeneration(
        Idefics3Config(
            text_config={"model_type": "llama", **TEXT},
            vision_config=SMALL_PATCHES,
            image_token_id=PLACEHOLDER,
            scale_factor=2,
        )
    )


def _smolvlm() -> PreTrainedModel:
    return SmolVLMForConditionalGeneration(
        SmolVLMConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config=SMALL_PATCHES,
            image_token_id=PLACEHOLDER,
            scale_factor=2,
        )
    )


def _mistral3() -> PreTrainedModel:
    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config={"model_type": "mistral", "sliding_window": None, **TEXT},
            vision_config={"model_type": "pixtral", **SMALL_PATCHES, "head_dim": 8},
            image_token_id=PLACEHOLDER,
            spatial_merge_size=2,
        )
    )


def _gemma3() -> PreTrainedModel:
    text = {**TEXT, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
    text["layer_types"] = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config=SMALL_PATCHES,
            image_token_id=PLACEHOLDER,
            boi_token_id=PLACEHOLDER + 1,
            eoi_token_id=PLACEHOLDER + 2,
            mm_tokens_per_image=4,
        )
    )


def _paligemma() -> PreTrainedModel:
    return PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            text_config={"model_type": "gemma", "head_dim": 8, **TEXT},
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
            image_token_id=PLACEHOLDER,
            projection_dim=32,
            hidden_size=32,
        )
    )


def _aria() -> PreTrainedModel:
    text = {
        **TEXT,
        "model_type": "aria_text",
        "moe_num_experts": 4,
        "moe_topk": 2,
        "moe_num_shared_experts": 1,
    }
    return AriaForConditionalGeneration(
        AriaConfig(
            text_config=text,
            vision_config={"model_type": "idefics3_vision", **SMALL_PATCHES},
            projector_patch_to_query_dict={16: 4},
            image_token_id=PLACEHOLDER,
        )
    )


def _blip_2() -> PreTrainedModel:
    text = {**TEXT, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
    qformer = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "encoder_hidden_size": 32, "cross_attention_frequency": 2,
    }  # fmt: skip
    return Blip2ForConditionalGeneration(
        Blip2Config(
            text_config=text,
            vision_config=SMALL_PATCHES,
            qformer_config=qformer,
            num_query_tokens=4,
            image_token_index=PLACEHOLDER,
        )
    )


def _mixtral() -> PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config={"model_type": "mixtral", **TEXT, **experts},
            vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
            image_token_id=PLACEHOLDER,
            image_seq_length=4,
        )
    )


def idefics2() -> PreTrainedModel:
    """Its perceiver is no connector that the cost model knows."""
    perceiver = {
        "hidden_size": 32, "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 4,
        "resampler_head_dim": 8, "num_key_value_heads": 2,
    }  # fmt: skip
    return Idefics2ForConditionalGeneration(
        Idefics2Config(
            text_config={"model_type": "mistral", "sliding_window": None, **TEXT},
            vision_config=SMALL_PATCHES,
            perceiver_config=perceiver,
            image_token_id=PLACEHOLDER,
        )
    )


def _squares(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of 16 x 16 pixels, four tokens each."""
    images = [noise(seed, 3, 16, 16) for seed in flat(seeds)]
    return Media({"pixel_values": torch.stack(images)}, [[PLACEHOLDER] * 4 for _ in images])


def _patches(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of 4 x 4 patches of 4 x 4 pixels, four tokens each."""
    pixels = [noise(seed, 16, 3 * 2 * 4 * 4) for seed in flat(seeds)]
    grids = torch.tensor([(1, 4, 4)] * len(pixels))
    return Media(
        {"pixel_values": torch.cat(pixels), "image_grid_thw": grids}, [[PLACEHOLDER] * 4] * len(pixels)
    )


def _sized(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    media = _squares(model, seeds)
    return Media(media.inputs | {"image_sizes": torch.tensor([[16, 16]] * len(media.tokens))}, media.tokens)


def _by_row(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of 16 x 16 pixels by row; rows with fewer images are filled with empty ones."""
    most = max(map(len, seeds))
    pixels = torch.zeros(len(seeds), most, 3, 16, 16)
    for row, images in enumerate(seeds):
        for place, seed in enumerate(images):
            pixels[row, place] = noise(seed, 3, 16, 16)
    return Media({"pixel_values": pixels}, [[PLACEHOLDER] * 4 for _ in flat(seeds)])


def _typed(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return inputs | {"token_type_ids": (inputs["input_ids"] == PLACEHOLDER).long()}


FAMILIES = [
    Family("qwen2_vl", _qwen2_vl, _patches, finish=token_types),
    Family("internvl", _internvl, _squares),
    Family("idefics3", _idefics3, _by_row),
    Family("smolvlm", _smolvlm, _by_row),
    Family("mistral3", _mistral3, _sized),
    Family("gemma3", _gemma3, _squares, finish=_typed),
    Family("paligemma", _paligemma, _squares, finish=_typed),
    Family("aria", _aria, _squares),
    Family("blip-2", _blip_2, _squares),
    Family("llava-mixtral", _mixtral, _squares),
]
