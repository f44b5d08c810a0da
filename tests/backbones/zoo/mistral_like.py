"""Mistral's vision models and their kin: a Pixtral tower for images of any size, 2 x 2 patches merged."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from .family import PLACEHOLDER, TEXT, Family, Media, Refused, flat, noise

PIXTRAL: dict[str, Any] = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}

SCALED_ROTARY = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 4,
    "llama_4_scaling_beta": 0.5,
}
"""Queries grow with the position, so that every position must be the one in the whole sequence."""


LATENT: dict[str, Any] = {
    **TEXT,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
"""Keys and values from a common latent vector, experts from the second layer on."""


def _mistral3(**text: Any) -> PreTrainedModel:
    return hf.Mistral3ForConditionalGeneration(
        hf.Mistral3Config(
            text_config={"model_type": "mistral", "sliding_window": None, "head_dim": 8, **TEXT, **text},
            vision_config=PIXTRAL,
            image_token_id=PLACEHOLDER,
        )
    )


_ministral3 = partial(
    _mistral3, model_type="ministral3", rope_parameters=SCALED_ROTARY, max_position_embeddings=8
)


MISTRAL4 = {**LATENT, "q_lora_rank": 16, "rope_parameters": SCALED_ROTARY, "max_position_embeddings": 8}


def _mistral_small_4() -> PreTrainedModel:
    return hf.Mistral3ForConditionalGeneration(
        hf.Mistral3Config(
            text_config={"model_type": "mistral4", **MISTRAL4},
            vision_config=PIXTRAL,
            image_token_id=PLACEHOLDER,
        )
    )


def _mistral4() -> PreTrainedModel:
    return hf.Mistral4ForCausalLM(hf.Mistral4Config(**MISTRAL4))


def _mistral_large4() -> PreTrainedModel:
    return hf.MistralLarge4ForConditionalGeneration(
        hf.MistralLarge4Config(
            text_config={**LATENT, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 8},
            vision_config=PIXTRAL,
            image_token_id=PLACEHOLDER,
        )
    )


def _lighton_ocr() -> PreTrainedModel:
    return hf.LightOnOcrForConditionalGeneration(
        hf.LightOnOcrConfig(
            text_config={"model_type": "qwen3", "head_dim": 8, **TEXT},
            vision_config=PIXTRAL,
            image_token_id=PLACEHOLDER,
        )
    )


def cropped_images(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of 16 x 16 or 16 x 8 pixels, padded to the larger: four tokens or two."""
    widths = [16 - 8 * (seed % 2) for seed in flat(seeds)]
    images = [noise(seed, 3, 16, 16) for seed in flat(seeds)]
    sizes = torch.tensor([[16, width] for width in widths])
    return Media(
        {"pixel_values": torch.stack(images), "image_sizes": sizes},
        [[PLACEHOLDER] * (width // 4) for width in widths],
    )


def counted_positions(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`finish` for models that read absolute positions: those `generate` would give, padding not counted."""
    return inputs | {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


FAMILIES = [
    Family("mistral3", _mistral3, cropped_images),
    Family("mistral3-ministral3", _ministral3, cropped_images, finish=counted_positions),
    Family("mistral3-mistral4", _mistral_small_4, cropped_images, finish=counted_positions),
    Family("lighton_ocr", _lighton_ocr, cropped_images),
]

REFUSED = [
    Refused("mistral4", _mistral4, "no placeholder tokens"),
    Refused("mistral_large4", _mistral_large4, "choose or keep their keys in a way of their own"),
]
