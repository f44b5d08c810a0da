"""Options of every command, as plain dataclasses.

This module imports neither torch nor transformers, so that `deepinsert --help` answers at once.
The same word means the same thing in every command.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

COUNTS = {
    "batch_size",
    "batch_tokens",
    "shard_prompts",
    "seeds",
    "steps",
    "repeats",
    "lora_rank",
    "gradient_accumulation",
    "save_every",
    "max_new_tokens",
    "timing_repeats",
    "text_tokens",
    "multimodal_tokens",
    "images",
    "threads",
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


def parse_sources(text: str) -> tuple[str, ...] | None:
    """`"coco,gqa"` as `("coco", "gqa")`; an empty text means every source and gives None."""
    return tuple(part.strip() for part in text.split(",") if part.strip()) or None


@dataclass(kw_only=True)
class RunOptions:
    out: Path
    """Run folder; the same command again continues what it finds there."""
    seed: int = 0
    """Seed of every random choice."""


@dataclass(kw_only=True)
class BackboneOptions:
    backbone: str = "tiny"
    """Folder, hub id, or "tiny" for the model that comes with the package."""
    device: str = "auto"
    """"auto" takes a GPU where there is one; else a torch device such as cpu or cuda:1."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; "auto" is float32 on a CPU, else the checkpoint's own."""
    batch_size: int = 32
    """Prompts per forward."""


@dataclass(kw_only=True)
class DataOptions:
    data: Path
    """Instructions in LLaVA's JSON (such as llava_v1_5_mix665k.json)."""
    image_root: Path | None = None
    """Folder that image paths are relative to; by default the folder of the data file."""
    sources: str = ""
    """Sources to keep, by the first part of the image path: coco,textvqa,gqa ("text" has no image)."""
    fraction: float = 1.0
    """Share of the records to keep, drawn with the seed image by image, with all that is asked about each."""
    max_bad: str = "0.5%"
    """Share of records that may have a missing or broken image before the command stops."""


@dataclass(kw_only=True)
class SweepOptions(RunOptions, BackboneOptions, DataOptions):
    """Loss and accuracy at every insert layer, without training (paper, Appendix C)."""

    insert_layers: str = "all"
    """Candidate layers: all, 0-7 or 0,4,8."""
    accuracy: bool = True
    """Also compare each greedy answer with the reference."""
    agreement: bool = False
    """Also say how often the most probable first token is that of layer 0, which is then computed too."""
    batch_tokens: int = 8192
    """Tokens per forward when losses are computed; bounds the memory."""
    table: Path | None = None
    """Folder of the reward table, which sweeps of one backbone may share; by default OUT/table."""
    shard: str = ""
    """Compute part i of n alone, as 0/4; by default what torchrun or accelerate launch assigns, or all."""
    shard_prompts: int = 1024
    """Prompts of one file of the table; what a killed run has to compute again."""


@dataclass(kw_only=True)
class TrainPolicyOptions(RunOptions, BackboneOptions, DataOptions):
    """Learn which layer each prompt's multimodal tokens should enter at, and judge what was learned."""

    algorithm: Literal["ppo", "a2c", "dqn", "full-info"] = "ppo"
    """PPO (paper), A2C or DQN of stable-baselines3, or the exact policy gradient over the reward table."""
    insert_layers: str = "all"
    """Candidate layers: all, 0-7 or 0,4,8."""
    skip_weight: float = 0.5
    """Weight λ of the skip bonus, where nothing else is asked for: reward = -loss (nats) + λ * bonus."""
    skip_weight_range: str = "auto"
    """Weights to be asked for later: "0-2"; "auto" is 0 to twice --skip-weight, "none" that one alone."""
    bonus: Literal["depth", "flops", "time"] = "depth"
    """Skip bonus: depth L/N (paper), the share of prefill FLOPs saved, or of measured prefill time."""
    observation: str = "embeddings"
    """What to see of a prompt's text: embeddings (paper), or hidden:K, its state after K layers."""
    observe_image: bool = False
    """Also see the mean of the projected image features."""
    held_out: float = 0.25
    """Share of images kept for judging the policy."""
    seeds: int = 5
    """Policies to train and judge, from --seed on; the first of them is saved."""
    steps: int | None = None
    """Episodes of each training, one prompt each; by default as many as the algorithm needs."""
    table: Path | None = None
    """Folder of a sweep's reward table: what it knows is taken over, what is computed added; by default
    OUT/table."""
    batch_tokens: int = 8192
    """Tokens per forward when losses are computed; bounds the memory."""


@dataclass(kw_only=True)
class RecommendOptions(RunOptions, BackboneOptions):
    """Ask a trained policy for an insert layer, for one prompt or for a data set."""

    policy: Path
    """Run folder of train-policy."""
    skip_weight: float | None = None
    """Weight λ to ask at, within the range the policy was trained for; by default its own."""
    flops_ratio: float | None = None
    """Or: a budget, mean prefill FLOPs against insert layer 0, such as 0.75."""
    max_loss_increase: float | None = None
    """Or: nats of mean loss above insert layer 0's that are tolerated, such as 0.02."""
    table: Path | None = None
    """Reward table of the data (OUT/table of sweep); by default the policy's, where it holds the prompts."""
    prompt: str | None = None
    """One question to recommend a layer for."""
    image: Path | None = None
    """Its image."""
    data: Path | None = None
    """Or: a data set in LLaVA's JSON."""
    image_root: Path | None = None
    """Folder that image paths are relative to; by default the folder of the data file."""
    sources: str = ""
    """Sources to keep, by the first part of the image path."""
    fraction: float = 1.0
    """Share of the records to keep, drawn with the seed image by image, with all that is asked about each."""
    max_bad: str = "0.5%"
    """Share of records that may have a missing or broken image before the command stops."""


@dataclass(kw_only=True)
class FinetuneOptions(RunOptions, BackboneOptions, DataOptions):
    """Finetune a variant whose multimodal tokens enter at a fixed layer."""

    insert_layer: int = 0
    """Insert layer of the variant; 0 finetunes the baseline."""
    method: Literal["lora", "full"] = "lora"
    """LoRA on the text model's linear layers, or every weight but the encoder's."""
    steps: int = 200
    """Optimiser steps."""
    learning_rate: float | None = None
    """By default 2e-4 for LoRA and 2e-5 for full (LLaVA-1.5)."""
    lora_rank: int = 128
    """Rank of LoRA's matrices; alpha is twice the rank (LLaVA-1.5)."""
    gradient_accumulation: int = 1
    """Batches per optimiser step."""
    save_every: int = 100
    """Optimiser steps between checkpoints that a killed run continues from."""


@dataclass(kw_only=True)
class EvaluateOptions(RunOptions, BackboneOptions, DataOptions):
    """Put variants beside the baseline: accuracy, loss, FLOPs, measured time, KV-cache bytes."""

    variants: tuple[Path, ...] = ()
    """Run folders of finetune, the baseline first; `--backbone` itself is used where none is given."""
    insert_layers: str | None = None
    """Also `--backbone` at these fixed layers, without finetuning: all, 0-7 or 0,4,8."""
    policy: Path | None = None
    """Run folder of train-policy: also `--backbone` with each prompt at the layer that it chooses."""
    skip_weight: float | None = None
    """Skip weight λ to ask the policy for; by default the one it was made for."""
    max_new_tokens: int = 32
    """Longest answer to generate."""
    timing_repeats: int = 7
    """Timed repeats of prefill and decode for each variant."""


@dataclass(kw_only=True)
class BenchOptions(RunOptions):
    """Measure prefill, decoding and training by insert layer beside the stock model, in paired rounds."""

    backbone: str = "bench"
    """Folder, hub id or "tiny" for a model of yours on rendered images; "bench" for a LLaVA with random
    weights, large enough for arithmetic to dominate (bench-half, bench-small and bench-tiny are smaller)."""
    full: bool = False
    """Batches of 1, 8 and 32 with up to 2,304 image tokens; takes the better part of an hour on two cores."""
    cases: str = ""
    """Only these: prefill,decode,train-full,train-lora,rows (one layer a row),ragged,mixed (both padded)."""
    insert_layers: str = "quarters"
    """Layers to measure: all, 0-7 or 0,4,8; "quarters" is 0 and each quarter of the depth."""
    batch_size: int | None = None
    """Rows of each forward; by default the batch sizes of the table, and 8 for a model of yours."""
    repeats: int | None = None
    """Rounds; each runs the stock model and every layer once. By default fewer for what takes longer."""
    threads: int | None = None
    """Threads of torch on a CPU; 1 gives the steadiest figures on a machine that others use too."""
    device: str = "auto"
    """"auto" takes a GPU where there is one; else a torch device such as cpu or cuda:1."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision; "auto" is float32 on a CPU, else bfloat16 or the checkpoint's own."""


@dataclass(kw_only=True)
class PredictOptions(RunOptions):
    """Expect times and memory of a device by the roofline model, from the model's config.json alone."""

    backbone: str = "tiny"
    """Folder with a config.json, hub id, or "tiny"; no weights are read or fetched."""
    device_name: str
    """A100-40, A100-80, H100, H200, L40S, "RTX 4090", T4, cpu (this machine, measured), or your own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of weights and cache; "auto" is the configuration's own."""
    text_tokens: int = 64
    """Text tokens of a prompt."""
    multimodal_tokens: int | None = None
    """Image or audio tokens of a prompt; by default those of its images, where all images have as many."""
    images: int = 1
    """Images or clips of a prompt."""
    batch_size: int = 1
    """Prompts in the batch."""
    insert_layers: str = "all"
    """Layers to predict: all, 0-7 or 0,4,8."""
    efficiency: float = 0.5
    """Share of the device's peak and bandwidth that kernels reach; ratios do not depend on it."""
    peak_tflops: float | None = None
    """TFLOP/s in this dtype of a device that is not in the table, with --bandwidth-gb and --memory-gb."""
    bandwidth_gb: float | None = None
    """Its memory bandwidth in GB/s."""
    memory_gb: float | None = None
    """Its memory in GB."""


@dataclass(kw_only=True)
class DemoOptions:
    """The whole way on the embedded tiny backbone, from data to the evaluation of a variant."""

    out: Path = Path("runs/demo")
    """Run folder; each step writes a folder named after its command."""
    seed: int = 0
    """Seed of every random choice."""
    skip_weight: float = 0.3
    """Weight λ of the skip bonus: reward = -loss (nats) + λ * bonus."""
    quick: bool = False
    """A much smaller run, to see that everything works."""


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
    if values.get("insert_layer", 0) < 0:
        raise ValueError(f"--insert-layer {values['insert_layer']}: give 0 (the baseline) or a layer above")
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
    if data is not None and not data.is_file():
        raise ValueError(f"--data {data}: there is no such file")
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
