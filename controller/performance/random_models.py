"""LLaVA models with random weights to measure on a CPU, large enough for arithmetic to dominate.

Time does not depend on the values of the weights. The vision tower is small, and its cost is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE_TOKEN = 999
PATCH_SIZE = 4


@dataclass(frozen=True)
class BenchModel:
    """Sizes of a LLaVA: decoder layers, width, width of the gated MLP, attention heads, patches per side."""

    layers: int
    width: int
    mlp_width: int
    heads: int
    side: int = 24
    """24 x 24 patches are 576 tokens, as in LLaVA-1.5."""

    def __str__(self) -> str:
        return f"{self.layers} layers, width {self.width}, MLP {self.mlp_width}"


BENCH_MODELS = {
    "bench": BenchModel(16, 512, 1376, 8),
    "bench-half": BenchModel(8, 512, 1376, 8),
    "bench-small": BenchModel(8, 256, 688, 4),
    "bench-tiny": BenchModel(4, 64, 172, 2, side=8),
}
"""`bench` is the model to measure; `bench-half` and `bench-small` replace it for batches that would take too
long on a CPU, and `bench-tiny` checks in seconds that everything works."""


def build_bench_model(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    image_token: int = IMAGE_TOKEN,
    vocabulary: int = IMAGE_TOKEN + 1,
) -> LlavaForConditionalGeneration:
    """Build a model with random weights, always the same, in eval mode.

    Args:
        name: a name in `BENCH_MODELS`.
        device: a torch device.
        dtype: the precision of the weights.
        image_token: the id of the placeholder for image tokens.
        vocabulary: the number of token ids.
    """
    size = BENCH_MODELS[name]
    text = LlamaConfig(
        hidden_size=size.width,
        intermediate_size=size.mlp_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size.side * PATCH_SIZE,
        patch_size=PATCH_SIZE,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    untyped: Any = model  # `eval` and `to` of transformers are not typed
    untyped.eval().to(device, dtype)
    return model
