"""Published configurations as numbers, and models built from them with random weights on any device.

Time does not depend on the values of the weights, so no checkpoint is needed to measure a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForMultimodalLM,
    LlavaConfig,
    LlavaNextConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
)

Scale = Literal["published", "tiny"]

VICUNA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32064,
}
VICUNA_13B = VICUNA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
MISTRAL_7B = VICUNA_7B | {
    "model_type": "mistral",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "sliding_window": None,
}
QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "vocab_size": 152064,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
}
CLIP_L_336: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
QWEN_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
PINPOINTS: list[list[int]] = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

# The numbers of the tiny scale, with which the same code runs in seconds on a CPU.
TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "vocab_size": 1000,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
}
TINY_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [1],
}


@dataclass(frozen=True)
class PublishedModel:
    """A published model: its id on the hub, its number of weights, and its configuration."""

    hub_id: str
    weights: int
    configuration: Callable[[Scale], PreTrainedConfig]

    def build(self, device: str | torch.device, dtype: torch.dtype, scale: Scale = "published") -> Any:
        """Build the model with random weights on `device`, without a copy on the CPU, in eval mode."""
        torch.manual_seed(0)
        auto_class: Any = AutoModelForMultimodalLM
        with torch.device(device):
            model = auto_class.from_config(self.configuration(scale), dtype=dtype).to(dtype)
        model.generation_config.eos_token_id = None
        return model.eval()


def _text(numbers: Mapping[str, Any], scale: Scale) -> dict[str, Any]:
    """Return the numbers of a text model at a scale."""
    return dict(numbers) | (TINY_TEXT if scale == "tiny" else {})


def _llava(numbers: Mapping[str, Any]) -> Callable[[Scale], Any]:
    def configuration(scale: Scale) -> LlavaConfig:
        vision = CLIP_L_336 | (TINY_CLIP if scale == "tiny" else {})
        placeholder = 999 if scale == "tiny" else 32000
        return LlavaConfig(
            text_config=_text(numbers, scale), vision_config=vision, image_token_index=placeholder
        )

    return configuration


def _llava_next(scale: Scale) -> LlavaNextConfig:
    vision = CLIP_L_336 | (TINY_CLIP if scale == "tiny" else {})
    share = vision["image_size"] / CLIP_L_336["image_size"]
    return LlavaNextConfig(
        text_config=_text(MISTRAL_7B, scale),
        vision_config=vision,
        image_token_index=999 if scale == "tiny" else 32000,
        image_grid_pinpoints=[[round(share * side) for side in sides] for sides in PINPOINTS],
    )


def _qwen(scale: Scale) -> Qwen2_5_VLConfig:
    text = _text(QWEN_7B, scale)
    vision = dict(QWEN_VISION)
    tokens: dict[str, Any] = {
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
    }
    if scale == "tiny":
        vision |= TINY_QWEN_VISION
        text["rope_parameters"] = text["rope_parameters"] | {"mrope_section": [2, 3, 3]}
        tokens = {"image_token_id": 999, "video_token_id": 998, "vision_start_token_id": 997}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)


PUBLISHED_MODELS = {
    "llava-1.5-7b": PublishedModel("llava-hf/llava-1.5-7b-hf", 7_063_427_072, _llava(VICUNA_7B)),
    "llava-1.5-13b": PublishedModel("llava-hf/llava-1.5-13b-hf", 13_351_494_656, _llava(VICUNA_13B)),
    "llava-next-7b": PublishedModel("llava-hf/llava-v1.6-mistral-7b-hf", 7_566_747_648, _llava_next),
    "qwen2.5-vl-7b": PublishedModel("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656, _qwen),
}
"""Published models by the name that `benchmarks/gpu.py` accepts."""
