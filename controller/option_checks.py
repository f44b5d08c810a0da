"""What the values of options mean and whether they can be right, told before anything is loaded.

Like `options.py` without torch.
"""

from __future__ import annotations

import math
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
WISHES = ("skip_weight", "flops_ratio", "max_loss_increase")
BENCH_CASES = ("prefill", "decode", "train-full", "train-lora", "rows", "ragged", "mixed")
MOST_LAYERS = 10_000  # more than any model has; the model's own number is known once it is loaded


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Insert layers named by `text`: `"all"` (0 to N-1), `"0-7"`, `"0,4,8"` or a mixture such as `"0-3,6"`.

    Returns the layers in ascending order, each once. Raises `ValueError` naming the part that is not an
    insert layer of a model with `num_layers` decoder layers.
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
    """A share in [0, 1] written as `"0.5%"` or `"0.005"`. Raises `ValueError` naming `option`."""
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = float("nan")
    if not 0 <= share <= 1:
        raise ValueError(f"{option} {text!r}: give a share such as 0.5% or 0.005, between 0 and 1")
    return share


def parse_shard(text: str) -> tuple[int, int] | None:
    """`"1/4"` as `(1, 4)`: the second of four parts; None for an empty text.

    Raises `ValueError` where there is no such part.
    """
    if not text:
        return None
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ValueError(f"--shard {text!r}: give a part and the number of parts, 0/4 to 3/4 for four")
    return int(part), int(parts)


def parse_cases(text: str) -> tuple[str, ...]:
    """`"prefill,decode"` as `("prefill", "decode")`; empty for an empty text.

    Raises `ValueError` naming a case that bench does not have.
    """
    cases = tuple(part.strip() for part in text.split(",") if part.strip())
    for case in cases:
        if case not in BENCH_CASES:
            raise ValueError(f"--cases {text!r}: {case!r} is no case; choose among {', '.join(BENCH_CASES)}")
    return cases


def parse_observation(text: str) -> int:
    """`"embeddings"` as 0 and `"hidden:3"` as 3: decoder layers of text alone before a prompt is observed.

    Raises `ValueError` for anything else; whether a model has so many layers is known once it is loaded.
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
    """The range of skip weights that `text` names: `"0-2"`, `"none"` for `skip_weight` alone, `"auto"` for 0
    to twice that (to 1 where it is 0).

    Raises `ValueError` where it is no range of weights, or one without `skip_weight`.
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
            f"--skip-weight-range {text!r} does not contain --skip-weight {skip_weight}: give a range that "
            "does, or another --skip-weight"
        )
    return low, high


def parse_skip_weight_list(text: str) -> tuple[float, ...]:
    """`"0,0.5"` as `(0.0, 0.5)`, in ascending order, each once. Raises `ValueError` for what is no weight."""
    try:
        weights = sorted({float(part) for part in text.split(",")})
    except ValueError:
        weights = [math.nan]
    if not all(weight >= 0 and math.isfinite(weight) for weight in weights):
        raise ValueError(f"--skip-weights {text!r}: give numbers of 0 or above, such as 0,0.1,0.5")
    return tuple(weights)


def parse_sources(text: str) -> tuple[str, ...] | None:
    """`"coco,gqa"` as `("coco", "gqa")`; an empty text means every source and gives None."""
    return tuple(part.strip() for part in text.split(",") if part.strip()) or None


def check(options: Any) -> None:
    """Raise `ValueError` for values that no model or data could make right, before anything is loaded.

    Values are looked at by name, so every command that has an option checks it alike.
    """
    values = vars(options)
    for name in COUNTS & values.keys():
        if values[name] is not None and values[name] < 1:
            raise ValueError(f"{flag(name)} {values[name]}: give at least 1")
    if "cases" in values:
        parse_cases(values["cases"])
    layers = values.get("insert_layers")
    if layers is not None and layers.strip() not in ("all", "quarters"):
        parse_layers(layers, MOST_LAYERS)
    if "shard" in values:
        parse_shard(values["shard"])
    if "max_bad" in values:
        parse_share(values["max_bad"], "--max-bad")
    if "fraction" in values and not 0 < values["fraction"] <= 1:
        raise ValueError(f"--fraction {values['fraction']}: give a share above 0 and at most 1")
    if "policy_fraction" in values and not 0 < values["policy_fraction"] <= 1:
        share = values["policy_fraction"]
        raise ValueError(f"--policy-fraction {share}: give a share above 0 and at most 1")
    if "skip_weights" in values:
        parse_skip_weight_list(values["skip_weights"])
    if "held_out" in values and not 0 < values["held_out"] < 1:
        raise ValueError(f"--held-out {values['held_out']}: give a share between 0 and 1")
    weight = values.get("skip_weight")
    if weight is not None and not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(f"--skip-weight {weight}: give 0 or a positive number")
    if "skip_weight_range" in values:
        parse_skip_weights(values["skip_weight_range"], values["skip_weight"])
    for observation in values.get("observation", "embeddings").split(","):
        parse_observation(observation)
    if weight is not None and values.get("policy", "") is None:
        raise ValueError(f"--skip-weight {weight}: it is asked of a policy; give --policy too")
    if "efficiency" in values and not 0 < values["efficiency"] <= 1:
        raise ValueError(f"--efficiency {values['efficiency']}: give a share above 0 and at most 1")
    if "peak_tflops" in values:
        _check_device(values)
    layer = values.get("insert_layer", 0)
    if layer != "random" and layer < 0:
        raise ValueError(f"--insert-layer {layer}: give 0 (the baseline) or a layer above")
    weight = values.get("distillation", 0)
    if not 0 <= weight <= 1:
        raise ValueError(f"--distillation {weight}: give a weight between 0 and 1")
    if "layer_distribution" in values:
        _check_depths(values)
    if "max_loss_increase" in values:
        _check_wishes(values)
    _check_paths(values)


def _check_wishes(values: dict[str, Any]) -> None:
    """What is asked of a policy: one wish at most, and a table only for a data set."""
    wishes = [name for name in WISHES if values[name] is not None]
    if len(wishes) > 1:
        raise ValueError(f"{' and '.join(map(flag, wishes))} exclude each other: give one of them")
    table = values["table"]
    if table is not None and values["data"] is None:
        raise ValueError(f"--table {table} goes with --data: it holds the losses of a data set's prompts")
    if table is not None and not table.is_dir():
        raise ValueError(f"--table {table}: there is no such folder; give OUT/table of sweep")


def _check_depths(values: dict[str, Any]) -> None:
    """What belongs to `--insert-layer random` goes with nothing else."""
    layer, given = values["insert_layer"], values["insert_layers"].strip() != "all"
    source, weight = values["layer_distribution"], values["distillation"]
    if layer != "random":
        named = {"insert_layers": given, "layer_distribution": source != "uniform", "distillation": weight}
        for name in (name for name, changed in named.items() if changed):
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
    if given:
        raise ValueError(
            f"--insert-layers {values['insert_layers']}: with a policy as --layer-distribution its own "
            "layers are drawn from; leave one of the two out"
        )


def _check_device(values: dict[str, Any]) -> None:
    """A device of one's own needs all three numbers; one from the table none."""
    given = {name: values[name] for name in ("peak_tflops", "bandwidth_gb", "memory_gb")}
    if any(value is not None for value in given.values()):
        for name, value in given.items():
            if value is None or not (value > 0 and math.isfinite(value)):
                raise ValueError(
                    f"{flag(name)} {value}: a device of your own needs {', '.join(map(flag, given))}, "
                    "all positive"
                )


def _check_paths(values: dict[str, Any]) -> None:
    """What must be there before a command starts: data, images, a policy, variants, a local backbone."""
    data, root = values.get("data"), values.get("image_root")
    # Published benchmarks may be folders of files.
    folder = values.get("benchmark", "instructions") != "instructions" and data is not None and data.is_dir()
    if data is not None and not data.is_file() and not folder:
        raise ValueError(f"--data {data}: there is no such file")
    answers = values.get("answers")
    if answers is not None and not answers.is_file():
        raise ValueError(f"--answers {answers}: there is no such file")
    if root is not None and not root.is_dir():
        raise ValueError(f"--image-root {root}: there is no such folder")
    backbone = values.get("backbone", "tiny")
    if backbone.startswith(("/", "./", "../", "~")) and not Path(backbone).expanduser().is_dir():
        raise ValueError(f'--backbone {backbone}: there is no such folder; give a folder, a hub id or "tiny"')
    for folder in values.get("variants", ()):
        if not (folder / "result.json").is_file():
            raise ValueError(
                f"--variants {folder}: no result.json there; give run folders of finished finetunes"
            )
    for folder in values.get("runs", ()):
        if not (folder / "result.json").is_file():
            raise ValueError(f"--runs {folder}: no result.json there; give run folders of finished evaluates")
    if "prompt" in values:
        if (values["prompt"] is None) == (data is None):
            raise ValueError("give either --prompt (with --image) or --data")
        if values["image"] is not None and not values["image"].is_file():
            raise ValueError(f"--image {values['image']}: there is no such file")
    policy = values.get("policy")
    if policy is not None and not (policy / "policy.json").is_file():
        raise ValueError(f"--policy {policy}: no policy.json there; give a run folder of train-policy")


def flag(name: str) -> str:
    """The option of a field: `"skip_weight"` is `--skip-weight`."""
    return "--" + name.replace("_", "-")
