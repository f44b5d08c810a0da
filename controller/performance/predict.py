"""`deepinsert predict`: expected times and memory of a device at each insert layer, without running on it.

It needs only the model's `config.json`; no weights are read.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from deepinsert.backbones import CostModel
from deepinsert.backbones.costs.encoder_costs import TiledEncoder
from deepinsert.backbones.loading import TINY
from deepinsert.controller.option_checks import check, parse_layers
from deepinsert.controller.options import PredictOptions
from deepinsert.controller.runs.atomic_files import to_json
from deepinsert.controller.runs.command import run_command
from deepinsert.controller.tables import terminal_table

from .performance_pictures import draw_predicted_ratios
from .roofline import Device, Prediction, device_named, predict

HEADINGS = (
    "insert layer",
    "prefill ms",
    "ratio",
    "bound by",
    "decode ms",
    "ratio",
    "bound by",
    "KV cache MB",
    "ratio",
    "FLOPs ratio",
)


def run(options: PredictOptions) -> dict[str, Any]:
    """Predict prefill, decode and memory at each layer; write `predict.png` and `result.json`."""
    check(options)
    result = predict_layers(options)

    def draw(out: Path) -> dict[str, Any]:
        draw_predicted_ratios(result, out / "predict.png")
        return result

    return run_command(options, draw, result_text, reuse=False)


def predict_layers(options: PredictOptions) -> dict[str, Any]:
    """Return the predictions for the stock model and for each insert layer, fit for JSON."""
    device = device_of(options)
    config = AutoConfig.from_pretrained(TINY if options.backbone == "tiny" else options.backbone)
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    costs = CostModel.from_config(config, dtype)
    device.peak(costs.dtype)
    layers = parse_layers(options.insert_layers, costs.num_layers)
    multimodal = multimodal_tokens(options, costs)
    stock, *predictions = (
        predict(
            costs,
            device,
            options.text_tokens,
            multimodal,
            layer,
            batch=options.batch_size,
            images=options.images,
            efficiency=options.efficiency,
        )
        for layer in (0, *layers)
    )
    numbers = {
        "stock": stock,
        "layers": predictions,
        "num_layers": costs.num_layers,
        "rows": options.batch_size,
        "text_tokens": options.text_tokens,
        "multimodal_tokens": multimodal,
        "encoder": costs.encoder.origin,
        "dtype": str(costs.dtype).removeprefix("torch."),
        "efficiency": options.efficiency,
        "device": device,
    }
    result: dict[str, Any] = to_json(result_of(numbers))
    return result


def device_of(options: PredictOptions) -> Device:
    """Return the device that the options name, or describe by its numbers."""
    if options.peak_tflops is None or options.bandwidth_gb is None or options.memory_gb is None:
        return device_named(options.device_name)
    precisions = ("float32", "bfloat16", "float16") if options.dtype == "auto" else (options.dtype,)
    peak = dict.fromkeys(precisions, options.peak_tflops * 1e12)
    return Device(options.device_name, peak, options.bandwidth_gb * 1e9, options.memory_gb * 1e9)


def multimodal_tokens(options: PredictOptions, costs: CostModel) -> int:
    """Return `--multimodal-tokens`, or the tokens of the images if each becomes a fixed number of them."""
    if options.multimodal_tokens is not None:
        return options.multimodal_tokens
    encoder = costs.encoder
    if not isinstance(encoder, TiledEncoder) or encoder.grids:
        raise ValueError(
            "--multimodal-tokens: images of this model differ in their numbers of tokens; give the number"
        )
    return options.images * encoder.tokens_per_tile


def result_of(result: dict[str, Any]) -> dict[str, Any]:
    """Return `result` with predictions and devices as dictionaries."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return dataclasses.asdict(value) if isinstance(value, (Prediction, Device)) else value

    return {name: plain(value) for name, value in result.items()}


def result_text(result: dict[str, Any]) -> str:
    """Return the result for a terminal: a table by insert layer, with the assumptions around it."""
    device, stock = result["device"], result["stock"]
    fits = "fit" if stock["fits"] else "do not fit"
    lines = [
        f"Predicted for {device['name']} with {result['rows']} rows of {result['text_tokens']} text + "
        f"{result['multimodal_tokens']} multimodal tokens, {result['num_layers']} layers, {result['dtype']}, "
        f"kernels at {result['efficiency']:.0%} of its peak",
        terminal_table(HEADINGS, [_table_row(row) for row in result["layers"]], ">"),
        f"At insert layer 0, weights ({stock['weight_bytes'] / 1e9:.3g} GB) and KV cache {fits} in "
        f"{device['memory'] / 1e9:.3g} GB; {stock['prefill']['intensity']:.0f} FLOPs per byte in prefill, "
        f"{stock['decode']['intensity']:.1f} in decode.",
    ]
    if result["encoder"] == "estimated":
        lines.append("The kind of the encoder is unknown: its cost is estimated from its number of weights.")
    return "\n".join(lines)


def _table_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells below `HEADINGS` for one insert layer."""
    prefill, decode = row["prefill"], row["decode"]
    return (
        str(row["insert_layer"]),
        f"{prefill['ms']:.4g}",
        f"{row['prefill_ratio']:.3f}",
        prefill["bound"],
        f"{decode['ms']:.4g}",
        f"{row['decode_ratio']:.3f}",
        decode["bound"],
        f"{row['kv_cache_bytes'] / 1e6:.4g}",
        f"{row['kv_cache_ratio']:.3f}",
        f"{row['flops_ratio']:.3f}",
    )
