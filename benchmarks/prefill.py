"""Prefill time by insert layer where image tokens dominate: 576 of them and 64 text tokens, as in LLaVA-1.5.

A LLaVA with random weights (time does not depend on them), large enough for arithmetic to dominate, beside
its untouched self in the same rounds: `make bench`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from controller.bench import measure_prefill, table
from controller.plots import prefill_times
from controller.runs import write_json

IMAGE_TOKEN = 999


def make_model(layers: int, width: int) -> LlavaForConditionalGeneration:
    """A LLaVA whose image becomes 576 tokens (24 x 24 patches); its vision tower is kept small."""
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        vocab_size=1000,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=96,
        patch_size=4,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    return LlavaForConditionalGeneration(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--text", type=int, default=64, help="text tokens")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    model = make_model(arguments.layers, arguments.width).to(arguments.device, dtype)
    ids = torch.randint(0, 900, (arguments.batch_size, arguments.text + 576))
    ids[:, 5 : 5 + 576] = IMAGE_TOKEN
    pixels = torch.randn(arguments.batch_size, 3, 96, 96)
    inputs = {
        "input_ids": ids.to(arguments.device),
        "attention_mask": torch.ones_like(ids).to(arguments.device),
        "pixel_values": pixels.to(arguments.device, dtype),
    }
    quarter = arguments.layers // 4
    layers = (0, quarter, 2 * quarter, 3 * quarter, arguments.layers)
    result = measure_prefill(model, inputs, layers, arguments.repeats)
    prefill_times(result, arguments.out / "prefill.png")
    write_json(arguments.out / "prefill.json", result)
    print(table(result))


if __name__ == "__main__":
    main()
