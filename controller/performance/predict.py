"""`deepinsert predict`: times and memory to expect of a device at each insert layer, before it is bought.

Works from the model's `config.json`; no weights are read.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import AutoConfig

from deepinsert.backbones import CostModel
from deepinsert.backbones.costs.encoder_costs import TiledEncoder
from deepinsert.backbones.loading import TINY
from deepinsert.controller.option_checks import check, parse_layers
from deepinsert.controller.options import PredictOptions
from deepinsert.controller.runs.folder import start_run, write_result

from .performance_pictures import predicted_ratios
from .roofline import Device, Prediction, device_named, predict


def run(options: PredictOptions) -> dict[str, Any]:
    """Predict prefill, decode and memory at each layer; write `predict.png` and `result.json`."""
    check(options)
    device = device_of(options)
    config = AutoConfig.from_pretrained(TINY if options.backbone == "tiny" else options.backbone)
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    costs = CostModel.from_config(config, dtype)
    device.peak(costs.dtype)
    layers = parse_layers(options.insert_layers, costs.num_layers)
    multimodal = multimodal_tokens(options, costs)
    out = start_run(options)
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
    result = {
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
    written = write_result(out, result_of(result))
    predicted_ratios(written, out / "predict.png")
    print(table(written))
    return written


def device_of(options: PredictOptions) -> Device:
    """The device that the options name, or describe by its numbers."""
    if options.peak_tflops is None or options.bandwidth_gb is None or options.memory_gb is None:
        return device_named(options.device_name)
    precisions = ("float32", "bfloat16", "float16") if options.dtype == "auto" else (options.dtype,)
    peak = dict.fromkeys(precisions, options.peak_tflops * 1e12)
    return Device(options.device_name, peak, options.bandwidth_gb * 1e9, options.memory_gb * 1e9)


def multimodal_tokens(options: PredictOptions, costs: CostModel) -> int:
    """Those given, or those of the images where each becomes a fixed number of tokens."""
    if options.multimodal_tokens is not None:
        return options.multimodal_tokens
    encoder = costs.encoder
    if not isinstance(encoder, TiledEncoder) or encoder.grids:
        raise ValueError(
            "--multimodal-tokens: images of this model differ in their numbers of tokens; say how many"
        )
    return options.images * encoder.tokens_per_tile


def result_of(result: dict[str, Any]) -> dict[str, Any]:
    """`result` as plain data."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return dataclasses.asdict(value) if isinstance(value, (Prediction, Device)) else value

    return {name: plain(value) for name, value in result.items()}


def table(result: dict[str, Any]) -> str:
    """The result for a terminal."""
    device, stock = result["device"], result["stock"]
    lines = [
        f"Expected of {device['name']} for {result['rows']} rows of {result['text_tokens']} text + "
        f"{result['multimodal_tokens']} multimodal tokens, {result['num_layers']} layers, {result['dtype']}, "
        f"kernels at {result['efficiency']:.0%} of its peak",
        f"{'insert layer':>12}  {'prefill ms':>10}  {'ratio':>5}  {'bound by':>8}  {'decode ms':>9}  "
        f"{'ratio':>5}  {'bound by':>8}  {'KV cache MB':>11}  {'ratio':>5}  {'FLOPs ratio':>11}",
    ]
    for row in result["layers"]:
        prefill, decode, flops = row["prefill"], row["decode"], row["flops_ratio"]
        cache, kept = row["kv_cache_bytes"] / 1e6, row["kv_cache_ratio"]
        lines.append(
            f"{row['insert_layer']:>12}  {prefill['ms']:>10.4g}  {row['prefill_ratio']:>5.3f}  "
            f"{prefill['bound']:>8}  {decode['ms']:>9.4g}  {row['decode_ratio']:>5.3f}  "
            f"{decode['bound']:>8}  {cache:>11.4g}  {kept:>5.3f}  {flops:>11.3f}"
        )
    fits = "fit" if stock["fits"] else "do not fit"
    lines.append(
        f"At insert layer 0, weights ({stock['weight_bytes'] / 1e9:.3g} GB) and KV cache {fits} in "
        f"{device['memory'] / 1e9:.3g} GB; {stock['prefill']['intensity']:.0f} FLOPs a byte in prefill, "
        f"{stock['decode']['intensity']:.1f} in decode."
    )
    if result["encoder"] == "estimated":
        lines.append("The encoder's kind is not known here: its cost is an estimate from its weights.")
    return "\n".join(lines)
