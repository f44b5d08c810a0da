"""Parses the values of options, and checks them before anything is loaded.

This module does not import torch, for the same reason as `options.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COUNTS = {
    "batch_size",
    "batch_tokens",
    "shard_prompts",
    "seeds",
    "steps",
    "repeats",
    "lora_rank",
    "gradient_accumulation",
    "global_batch_size",
    "save_every",
    "max_new_tokens",
    "timing_repeats",
    "text_tokens",
    "multimodal_tokens",
    "images",
    "threads",
    "jobs",
    "longer",
}
"""Options that are whole numbers of at least 1, or None."""

SHARES = ("fraction", "policy_fraction", "efficiency")
"""Options that are above 0 and at most 1."""

WISHES = ("skip_weight", "flops_ratio", "max_loss_increase")
"""Options of recommend that exclude each other."""

DEVICE_FIGURES = ("peak_tflops", "bandwidth_gb", "memory_gb")
BENCH_CASES = ("prefill", "decode", "train-full", "train-lora", "rows", "ragged", "mixed")
MOST_LAYERS = 10_000
"""More layers than any model has. The exact number is checked after the model is loaded."""


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Parse insert layers: `"all"` (0 to N-1), `"0-7"`, `"0,4,8"` or a mixture such as `"0-3,6"`.

    Returns the layers in ascending order, without duplicates. Raises `ValueError`, which names the part, if a
    part is not an insert layer of a model with `num_layers` decoder layers.
    """
    if text.strip() == "all":
        return tuple(range(num_layers))
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise ValueError(f"--insert-layers {text!r}: {part!r} is neither a layer nor a range such as 0-7")
        if int(last) > num_layers:
            raise ValueError(
                f"--insert-layers {text!r}: {part!r} is outside 0 to {num_layers}, "
                f"the insert layers of a model with {num_layers} decoder layers"
            )
        layers.update(range(int(first), int(last) + 1))
    return tuple(sorted(layers))


def parse_share(text: str, option: str) -> float:
    """Parse a share in [0, 1], written as `"0.5%"` or `"0.005"`.

    Raises `ValueError`, which names `option`, for anything else.
    """
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = float("nan")
    if not 0 <= share <= 1:
        raise ValueError(f"{option} {text!r}: give a share such as 0.5% or 0.005, between 0 and 1")
    return share


def parse_shard(text: str) -> tuple[int, int] | None:
    """Parse a part and the number of parts: `"1/4"` is `(1, 4)`, the second of four. Empty text gives None.

    Raises `ValueError` if there is no such part.
    """
    if not text:
        return None
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ValueError(f"--shard {text!r}: give a part and the number of parts, 0/4 to 3/4 for four")
    return int(part), int(parts)


def parse_cases(text: str) -> tuple[str, ...]:
    """Parse cases of bench: `"prefill,decode"` is `("prefill", "decode")`. Empty text gives no case.

    Raises `ValueError` for a case that bench does not have.
    """
    cases = tuple(part.strip() for part in text.split(",") if part.strip())
    for case in cases:
        if case not in BENCH_CASES:
            cases_of_bench = ", ".join(BENCH_CASES)
            raise ValueError(f"--cases {text!r}: bench has no case {case!r}; choose among {cases_of_bench}")
    return cases


def parse_observation(text: str) -> int:
    """Parse an observation as the number of decoder layers before it: `"embeddings"` is 0, `"hidden:3"` is 3.

    These layers run on text alone. Raises `ValueError` for anything else. The number of layers of the model
    is not checked here.
    """
    kind, colon, layer = text.strip().partition(":")
    if kind == "embeddings" and not colon:
        return 0
    if kind == "hidden" and layer.isdecimal() and layer.isascii() and 0 < int(layer) <= MOST_LAYERS:
        return int(layer)
    raise ValueError(
        f"--observation {text!r}: give embeddings, or hidden:K for the hidden state after K decoder layers "
        "of text alone, such as hidden:2"
    )


def parse_skip_weights(text: str, skip_weight: float) -> tuple[float, float]:
    """Parse a range of skip weights, such as `"0-2"`.

    `"none"` is `skip_weight` alone; `"auto"` is 0 to twice `skip_weight`, or 0 to 1 if `skip_weight` is 0.
    Raises `ValueError` for anything else, and for a range that does not contain `skip_weight`.
    """
    if text == "none":
        return skip_weight, skip_weight
    if text == "auto":
        return 0.0, 2 * skip_weight or 1.0
    first, _, last = text.partition("-")
    try:
        low, high = float(first), float(last)
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and 0 <= low < high):
        raise ValueError(
            f'--skip-weight-range {text!r}: give a range of weights such as "0-2", "auto" or "none"'
        )
    if not low <= skip_weight <= high:
        raise ValueError(
            f"--skip-weight-range {text!r} does not contain --skip-weight {skip_weight}: change the range or "
            "the weight"
        )
    return low, high


def parse_skip_weight_list(text: str) -> tuple[float, ...]:
    """Parse skip weights: `"0,0.5"` is `(0.0, 0.5)`, in ascending order, without duplicates.

    Raises `ValueError` if a part is not a finite number of at least 0.
    """
    try:
        weights = sorted({float(part) for part in text.split(",")})
    except ValueError:
        weights = [math.nan]
    if not all(weight >= 0 and math.isfinite(weight) for weight in weights):
        raise ValueError(f"--skip-weights {text!r}: give numbers of 0 or above, such as 0,0.1,0.5")
    return tuple(weights)


def parse_sources(text: str) -> tuple[str, ...] | None:
    """Parse sources: `"coco,gqa"` is `("coco", "gqa")`. Empty text means every source and gives None."""
    return tuple(part.strip() for part in text.split(",") if part.strip()) or None


def check(options: object) -> None:
    """Check the options of any command before anything is loaded.

    Options are checked by name, in the same way in every command that has them. Raises `ValueError` for
    values that are wrong for every model and all data, and for files and folders that do not exist.
    """
    values = vars(options)
    _check_numbers(values)
    _check_texts(values)
    _check_skip_weight(values)
    if "peak_tflops" in values:
        _check_device(values)
    if "layer_distribution" in values:
        _check_depths(values)
    if "max_loss_increase" in values:
        _check_wishes(values)
    _check_data_paths(values)
    _check_run_folders(values)


def _check_numbers(values: Mapping[str, Any]) -> None:
    """Check the options that are single numbers."""
    for name in sorted(COUNTS & values.keys()):
        if values[name] is not None and values[name] < 1:
            raise ValueError(f"{flag(name)} {values[name]}: give at least 1")
    for name in SHARES:
        if not 0 < values.get(name, 1) <= 1:
            raise ValueError(f"{flag(name)} {values[name]}: give a share above 0 and at most 1")
    if not 0 < values.get("held_out", 0.5) < 1:
        raise ValueError(f"--held-out {values['held_out']}: give a share between 0 and 1")
    if not 0 <= values.get("distillation", 0) <= 1:
        raise ValueError(f"--distillation {values['distillation']}: give a weight between 0 and 1")
    if values.get("score_samples", 0) < 0:
        raise ValueError(f"--score-samples {values['score_samples']}: give 0 or more")
    layer = values.get("insert_layer", 0)
    if layer != "random" and layer < 0:
        raise ValueError(f"--insert-layer {layer}: give 0 (the baseline) or a layer above")


def _check_texts(values: Mapping[str, Any]) -> None:
    """Check the options that are parsed from text."""
    if "cases" in values:
        parse_cases(values["cases"])
    layers = values.get("insert_layers")
    if layers is not None and layers.strip() not in ("all", "quarters"):
        parse_layers(layers, MOST_LAYERS)
    if "shard" in values:
        parse_shard(values["shard"])
    if "max_bad" in values:
        parse_share(values["max_bad"], "--max-bad")
    if "skip_weights" in values:
        parse_skip_weight_list(values["skip_weights"])
    for observation in values.get("observation", "embeddings").split(","):
        parse_observation(observation)


def _check_skip_weight(values: Mapping[str, Any]) -> None:
    """Check the skip weight, its range, and that a policy is there to use it."""
    weight = values.get("skip_weight")
    if weight is not None and not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(f"--skip-weight {weight}: give 0 or a positive number")
    if "skip_weight_range" in values:
        parse_skip_weights(values["skip_weight_range"], values["skip_weight"])
    if weight is not None and values.get("policy", "") is None:
        raise ValueError(f"--skip-weight {weight}: only a policy uses this weight; give --policy too")


def _check_wishes(values: Mapping[str, Any]) -> None:
    """Check that recommend has at most one wish, and a table only for a data set."""
    wishes = [name for name in WISHES if values[name] is not None]
    if len(wishes) > 1:
        raise ValueError(f"{' and '.join(map(flag, wishes))} exclude each other: give one of them")
    table = values["table"]
    if table is not None and values["data"] is None:
        raise ValueError(f"--table {table} goes with --data: it holds the losses of a data set's prompts")
    if table is not None and not table.is_dir():
        raise ValueError(f"--table {table}: there is no such folder; give OUT/table of sweep")


def _check_depths(values: Mapping[str, Any]) -> None:
    """Check that the options of `--insert-layer random` are used with it only, and fit each other."""
    layer, names_layers = values["insert_layer"], values["insert_layers"].strip() != "all"
    source, weight = values["layer_distribution"], values["distillation"]
    if layer != "random":
        is_changed = {
            "insert_layers": names_layers,
            "layer_distribution": source != "uniform",
            "distillation": weight,
        }
        for name in (name for name, changed in is_changed.items() if changed):
            raise ValueError(
                f"{flag(name)} {values[name]} goes with --insert-layer random, not with layer {layer}"
            )
    if source == "uniform":
        return
    if not (Path(source) / "policy.json").is_file():
        raise ValueError(
            f"--layer-distribution {source}: give uniform, or a run folder of train-policy (it has a "
            "policy.json)"
        )
    if names_layers:
        raise ValueError(
            f"--insert-layers {values['insert_layers']}: with a policy as --layer-distribution its own "
            "layers are drawn from; leave one of the two out"
        )


def _check_device(values: Mapping[str, Any]) -> None:
    """Check that a user's own device has all three figures, or that none of them is set."""
    figures = {name: values[name] for name in DEVICE_FIGURES}
    if all(figure is None for figure in figures.values()):
        return
    for name, figure in figures.items():
        if figure is None or not (figure > 0 and math.isfinite(figure)):
            raise ValueError(
                f"{flag(name)} {figure}: a device of your own needs {', '.join(map(flag, figures))}, "
                "all positive"
            )


def _check_data_paths(values: Mapping[str, Any]) -> None:
    """Check that data, answers, images and a local backbone exist."""
    data = values.get("data")
    is_published = values.get("benchmark", "instructions") != "instructions"
    # Published benchmarks may be folders of files.
    if data is not None and not data.is_file() and not (is_published and data.is_dir()):
        raise ValueError(f"--data {data}: there is no such file")
    answers = values.get("answers")
    if answers is not None and not answers.is_file():
        raise ValueError(f"--answers {answers}: there is no such file")
    root = values.get("image_root")
    if root is not None and not root.is_dir():
        raise ValueError(f"--image-root {root}: there is no such folder")
    backbone = values.get("backbone", "tiny")
    if backbone.startswith(("/", "./", "../", "~")) and not Path(backbone).expanduser().is_dir():
        raise ValueError(f'--backbone {backbone}: there is no such folder; give a folder, a hub id or "tiny"')
    if "prompt" in values:
        if (values["prompt"] is None) == (data is None):
            raise ValueError("give either --prompt (with --image) or --data")
        if values["image"] is not None and not values["image"].is_file():
            raise ValueError(f"--image {values['image']}: there is no such file")


def _check_run_folders(values: Mapping[str, Any]) -> None:
    """Check that the folders of other commands hold their results."""
    for name, command in (("variants", "finetune"), ("runs", "evaluate")):
        for folder in values.get(name, ()):
            if not (folder / "result.json").is_file():
                raise ValueError(
                    f"{flag(name)} {folder}: the folder has no result.json; "
                    f"give folders of finished {command} runs"
                )
    policy = values.get("policy")
    if policy is not None and not (policy / "policy.json").is_file():
        raise ValueError(
            f"--policy {policy}: the folder has no policy.json; give a run folder of train-policy"
        )


def flag(name: str) -> str:
    """Return the option of a field: `"skip_weight"` is `--skip-weight`."""
    return "--" + name.replace("_", "-")
