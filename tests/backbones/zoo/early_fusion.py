"""Images as words of the vocabulary, as projected patches, or among the rows of a mixture of experts."""

from __future__ import annotations

import torch
import transformers as hf
from transformers import PreTrainedModel

from .family import PLACEHOLDER, TEXT, VISION, Family, Media, flat, noise
from .llava_like import square_images

CODES = 8
"""Words of the vocabulary that stand for a piece of an image."""

LINE_END = TEXT["vocab_size"]
VOCABULARY = TEXT["vocab_size"] + 1 + CODES


def _chameleon() -> PreTrainedModel:
    codes = {f"IMGIMG{'ABCDEFGH'[n]}Z": LINE_END + 1 + n for n in range(CODES)}
    return hf.ChameleonForConditionalGeneration(
        hf.ChameleonConfig(
            **{**TEXT, "vocab_size": VOCABULARY},
            vocabulary_map={"<image>": PLACEHOLDER, **codes},
            vq_config={
                "embed_dim": 4,
                "num_embeddings": CODES,
                "latent_channels": 4,
                "resolution": 16,
                "base_channels": 32,
                "channel_multiplier": [1, 1, 1, 1],
                "num_res_blocks": 1,
            },
        )
    )


def _emu3() -> PreTrainedModel:
    codes = {f"<|visual token {n:06d}|>": LINE_END + 1 + n for n in range(CODES)}
    return hf.Emu3ForConditionalGeneration(
        hf.Emu3Config(
            text_config={**TEXT, "vocab_size": VOCABULARY, "attention_dropout": 0.0},
            vocabulary_map={"<image>": PLACEHOLDER, "<|extra_200|>": LINE_END, **codes},
            vq_config={
                "codebook_size": CODES,
                "base_channels": 32,
                "channel_multiplier": [1, 1, 1, 1],
                "num_res_blocks": 1,
                "hidden_size": 32,
                "attn_resolutions": [3],
            },
        )
    )


def _fuyu() -> PreTrainedModel:
    return hf.FuyuForCausalLM(
        hf.FuyuConfig(
            text_config={"model_type": "persimmon", **TEXT, "qk_layernorm": True},
            image_token_id=PLACEHOLDER,
            image_size=16,
            patch_size=8,
        )
    )


def _llama4() -> PreTrainedModel:
    return hf.Llama4ForConditionalGeneration(
        hf.Llama4Config(
            text_config={
                **TEXT,
                "intermediate_size_mlp": 48,
                "head_dim": 8,
                "num_local_experts": 4,
                "moe_layers": [1, 3],
                "attention_chunk_size": 6,
                "no_rope_layer_interval": 2,
            },
            vision_config={
                **VISION,
                "intermediate_size": 128,
                "patch_size": 4,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            image_token_index=PLACEHOLDER,
            boi_token_index=PLACEHOLDER + 1,
            eoi_token_index=PLACEHOLDER + 2,
        )
    )


def _coded_images(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of 16 x 16 or 16 x 8 pixels, framed as 16 x 16: one token per piece and per end of a line."""
    wide = [16 - 8 * (seed % 2) for seed in flat(seeds)]
    inputs = {
        "pixel_values": torch.stack([noise(seed, 3, 16, 16) for seed in flat(seeds)]),
        "image_sizes": torch.tensor([[16, width] for width in wide]),
    }
    return Media(inputs, [[PLACEHOLDER] * (2 * (width // 8 + 1)) for width in wide])


def _projected_patches(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of four patches of 8 x 8 pixels, with a token at the end of each line."""
    patches = torch.stack([noise(seed, 4, 192) for seed in flat(seeds)])
    line = [PLACEHOLDER, PLACEHOLDER, PLACEHOLDER + 1]
    return Media({"pixel_values": patches}, [line * 2 for _ in flat(seeds)])


FAMILIES = [
    Family("chameleon", _chameleon, square_images, scale=2.0),
    Family("emu3", _emu3, _coded_images),
    Family("fuyu", _fuyu, _projected_patches),
    Family("llama4", _llama4, square_images, broken_in="5.24.0"),
]
