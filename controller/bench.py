"""`deepinsert bench`: how long the prefill takes at each insert layer, beside the untouched stock model.

Every round runs the stock model and every layer once, on the same inputs and in turned order, so that
whatever else slows the machine falls on all of them; ratios are taken within a round.
"""

from __future__ import annotations

import inspect
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from backbones import CostModel, deep_insert, load_backbone, remove_deep_insert
from backbones.families import base_model_of, placeholder_token_ids

from .answers import generation_inputs
from .options import BenchOptions, check, parse_layers
from .plots import prefill_times
from .runs import describe_machine, machine, progress, start_run, write_result
from .timing import synchronise

WARM_UP = 1


def run(options: BenchOptions) -> dict[str, Any]:
    """Measure the backbone on rendered images with a question each; write `bench.png` and `result.json`."""
    from envs.instructions import load_instructions
    from envs.prompts import prompts_from
    from envs.rendering import render_instructions

    check(options)
    out = start_run(options)
    backbone = load_backbone(options.backbone, device=options.device, dtype=options.dtype)
    layers = parse_layers(options.insert_layers, backbone.num_layers)
    with tempfile.TemporaryDirectory() as folder:
        path = render_instructions(Path(folder), options.batch_size, options.seed, questions_per_image=1)
        prompts = [prompt for prompt in prompts_from(load_instructions(path), per="record") if prompt.images]
        inputs = generation_inputs(backbone, prompts[: options.batch_size])
    result = measure_prefill(backbone.model, inputs, layers, options.repeats)
    prefill_times(result, out / "bench.png")
    write_result(out, result)
    print(table(result))
    return result


def measure_prefill(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], insert_layers: Sequence[int], repeats: int
) -> dict[str, Any]:
    """Time the prefill of `inputs`, one batch as the model takes it, in `repeats` rounds.

    Returns times in ms for `stock` and for each of `layers`, each layer with its median ratio to the stock
    model's time of the same round, the quartiles of that ratio, and the ratio that the FLOPs allow.
    """
    arms: list[int | None] = [None, *insert_layers]
    times = np.full((repeats, len(arms)), np.nan)
    keep = "logits_to_keep" in inspect.signature(type(base_model_of(model)).forward).parameters
    extra = {"logits_to_keep": 1} if keep else {}
    before = deep_insert(model).config.deepinsert["insert_layer"]
    for round_ in progress(range(-WARM_UP, repeats), "prefill"):
        order = list(enumerate(arms))
        for arm, layer in order if round_ % 2 else reversed(order):
            remove_deep_insert(model) if layer is None else deep_insert(model, layer)
            synchronise(model.device)
            started = time.perf_counter()
            with torch.inference_mode():
                model(**inputs, use_cache=True, **extra)
            synchronise(model.device)
            if round_ >= 0:
                times[round_, arm] = 1000 * (time.perf_counter() - started)
    deep_insert(model, before)
    ratios = times / times[:, :1]
    text, multimodal = count_tokens(model, inputs)
    costs = CostModel.from_model(model)
    return {
        "stock": summary(times[:, 0]),
        "layers": [
            {
                "insert_layer": layer,
                **summary(times[:, arm]),
                "time_ratio": float(np.median(ratios[:, arm])),
                "time_ratio_quartiles": np.quantile(ratios[:, arm], [0.25, 0.75]),
                "flops_ratio": costs.flops_ratio(text, multimodal, layer, logits_to_keep=1),
                "kv_cache_bytes": costs.kv_cache_bytes(text, multimodal, layer),
            }
            for arm, layer in enumerate(arms)
            if layer is not None
        ],
        "num_layers": costs.num_layers,
        "rows": len(inputs["input_ids"]),
        "text_tokens": text,
        "multimodal_tokens": multimodal,
        "repeats": repeats,
        "attention": getattr(model.config, "_attn_implementation", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "machine": machine(),
    }


def summary(times: np.ndarray) -> dict[str, Any]:
    """Median and quartiles of times in ms."""
    return {"prefill_ms": float(np.median(times)), "prefill_ms_quartiles": np.quantile(times, [0.25, 0.75])}


def count_tokens(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Text and multimodal tokens of a row, in the mean over the batch."""
    ids = inputs["input_ids"]
    placeholders = torch.tensor(sorted(placeholder_token_ids(model.config)), device=ids.device)
    multimodal = torch.isin(ids, placeholders)
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(multimodal)
    rows = len(ids)
    return round(int((real & ~multimodal).sum()) / rows), round(int(multimodal.sum()) / rows)


def table(result: dict[str, Any]) -> str:
    """The result for a terminal."""
    lines = [
        f"Prefill of {result['rows']} rows of {result['text_tokens']} text + {result['multimodal_tokens']} "
        f"multimodal tokens, {result['num_layers']} layers, {result['dtype']}, "
        f"{describe_machine(result['machine'])}",
        f"{'insert layer':>12}  {'ms':>8}  {'time ratio':>10}  {'FLOPs ratio':>11}",
        f"{'stock':>12}  {result['stock']['prefill_ms']:8.1f}  {1:10.3f}  {1:11.3f}",
    ]
    for row in result["layers"]:
        lines.append(
            f"{row['insert_layer']:>12}  {row['prefill_ms']:8.1f}  {row['time_ratio']:10.3f}  "
            f"{row['flops_ratio']:11.3f}"
        )
    return "\n".join(lines)
