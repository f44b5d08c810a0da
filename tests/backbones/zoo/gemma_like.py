"""The Gemma families of images: a SigLIP tower, with bidirectional attention within images."""

from __future__ import annotations

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from .family import PLACEHOLDER, TEXT, VISION, Family
from .llava_like import square_images

SLIDING = {
    **TEXT,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
"""Windows smaller than the prompt, in every second layer."""

SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION}


def _gemma3() -> PreTrainedModel:
    model = hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            text_config={"model_type": "gemma3_text", **SLIDING},
            vision_config=SIGLIP,
            image_token_index=PLACEHOLDER,
            boi_token_index=PLACEHOLDER + 1,
            eoi_token_index=PLACEHOLDER + 2,
            mm_tokens_per_image=4,
        )
    )
    # Zeros in a model from its configuration, with which all images are the same.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.02)
    return model


def _paligemma() -> PreTrainedModel:
    return hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(
            text_config={"model_type": "gemma2", **SLIDING},
            vision_config=SIGLIP,
            image_token_index=PLACEHOLDER,
            projection_dim=32,
            hidden_size=32,
        )
    )


def typed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the token types that the processor gives: 1 for image tokens, 0 for others."""
    return inputs | {"token_type_ids": (inputs["input_ids"] == PLACEHOLDER).long()}


def _prefixed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mark the whole prompt as prefix, whose tokens attend to each other in both directions."""
    return inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}


FAMILIES = [
    Family("gemma3", _gemma3, square_images, finish=typed, remark="ShieldGemma 2 is the same model."),
    Family("paligemma", _paligemma, square_images, finish=_prefixed),
]
