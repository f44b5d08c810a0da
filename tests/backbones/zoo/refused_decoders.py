"""Model types whose decoder an image cannot enter late, beside encoder-decoders."""

from __future__ import annotations

from typing import Any

import transformers as hf
from transformers import PreTrainedModel

from .family import PLACEHOLDER, TEXT, Refused

RELATIVE: dict[str, Any] = {
    **TEXT,
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 6,
    "d_rel": 4,
    "rel_extent": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}


def _inkling() -> PreTrainedModel:
    return hf.InklingForConditionalGeneration(
        hf.InklingConfig(
            text_config={**RELATIVE, "n_shared_experts": 1},
            vision_config={"patch_size": 8, "hidden_size": 32, "n_layers": 1, "num_attention_heads": 4},
            audio_config={"n_mel_bins": 8, "mel_vocab_size": 8},
            image_token_id=PLACEHOLDER,
            audio_token_id=PLACEHOLDER + 1,
        )
    )


def _inkling2() -> PreTrainedModel:
    vision = {
        "patch_size": 8,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "text_hidden_size": 32,
    }
    return hf.Inkling2ForConditionalGeneration(
        hf.Inkling2Config(text_config=RELATIVE, vision_config=vision, image_token_id=PLACEHOLDER)
    )


def _diffusion_gemma() -> PreTrainedModel:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "patch_size": 4,
        "position_embedding_size": 8,
    }
    experts = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    return hf.DiffusionGemmaForBlockDiffusion(
        hf.DiffusionGemmaConfig(
            text_config={**TEXT, "head_dim": 8, "global_head_dim": 16, **experts},
            vision_config=vision,
            image_token_id=PLACEHOLDER,
        )
    )


REFUSED = [
    Refused("inkling_mm_model", _inkling, "numbers the rows"),
    Refused("inkling2", _inkling2, "numbers the rows|in a way of their own"),
    Refused("diffusion_gemma", _diffusion_gemma, "takes no embeddings"),
]
