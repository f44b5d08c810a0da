"""Square tiles through a vision tower, patches merged into fewer tokens: InternVL and GOT-OCR."""

from __future__ import annotations

import torch
import transformers as hf
from transformers import PreTrainedModel

from .family import PLACEHOLDER, TEXT, VISION, Family, Media, flat, noise

SMALL_PATCHES = {**VISION, "patch_size": 4}
"""4 x 4 patches, which the families below merge to four tokens."""


def _internvl() -> PreTrainedModel:
    return hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(
            text_config={"model_type": "qwen2", **TEXT},
            vision_config=SMALL_PATCHES,
            image_token_id=PLACEHOLDER,
        )
    )


def _qianfan_ocr() -> PreTrainedModel:
    return hf.QianfanOCRForConditionalGeneration(
        hf.QianfanOCRConfig(
            text_config={"model_type": "qwen3", "head_dim": 8, **TEXT},
            vision_config=SMALL_PATCHES,
            image_token_id=PLACEHOLDER,
        )
    )


def _got_ocr2() -> PreTrainedModel:
    vision = {
        "hidden_size": 32,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 2,
        "window_size": 4,
        "global_attn_indexes": [1],
        "mlp_dim": 48,
        "initializer_range": 0.02,
    }
    return hf.GotOcr2ForConditionalGeneration(
        hf.GotOcr2Config(
            text_config={"model_type": "qwen2", **TEXT}, vision_config=vision, image_token_id=PLACEHOLDER
        )
    )


def tiles(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of one or two tiles of 16 x 16 pixels, four tokens each."""
    counts = [1 + seed % 2 for seed in flat(seeds)]
    pixels = [noise(seed, count, 3, 16, 16) for seed, count in zip(flat(seeds), counts, strict=True)]
    return Media({"pixel_values": torch.cat(pixels)}, [[PLACEHOLDER] * 4 * count for count in counts])


FAMILIES = [
    Family("internvl", _internvl, tiles),
    Family("qianfan_ocr", _qianfan_ocr, tiles),
    Family("got_ocr2", _got_ocr2, tiles, remark="`pp_chart2table` is this class."),
]
