"""Measured time and memory: prefill and decode of variants side by side, bytes of the real cache.

Each forward that `generate` makes is timed where the model is called, the device synchronised before and
after: what is measured is what a user of `generate` waits for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deepinsert.backbones import Backbone, CostModel
from deepinsert.controller.answers.batched import generation_inputs
from deepinsert.controller.runs.progress_bars import progress_bar
from deepinsert.envs.prompts import Prompt
from deepinsert.envs.rewards.time_bonus import WARM_UP, synchronise

from .variants import Variant

DECODE_TOKENS = 8


@dataclass
class Forwards:
    """Milliseconds of the forwards of one `generate`: the prefill, then one for each further token."""

    milliseconds: list[float] = field(default_factory=list)
    cache_bytes: int = 0
    """Bytes of all keys and values after the prefill, for the whole batch."""


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one batch: a value of each for every repeat, in ms."""

    batch_size: int
    prefill_ms: list[float]
    decode_ms: list[float]
    """Per new token of the whole batch, mean over a repeat's tokens."""
    choice_ms: list[float]
    """In which a policy chose the layers, words and images read included; 0 without one."""
    generations: list[Generation]
    """Of the first named batch alone: answers as `generate` gives them, whatever their length."""


@dataclass(frozen=True)
class Generation:
    """Answers to one batch, from its words and images on: seconds, tokens of text, and peak bytes.

    `peak_bytes` are those of this variant's weights and of what the generation adds; None but on CUDA, where
    the allocator counts them.
    """

    seconds: float
    tokens: int
    peak_bytes: int | None


def time_variants(
    variants: Sequence[Variant],
    prompts: Sequence[Prompt],
    batches: Mapping[str, NDArray[Any]],
    repeats: int,
    max_new_tokens: int,
    new_tokens: int = DECODE_TOKENS,
) -> dict[str, list[Timing]]:
    """Time every variant on each named batch, rows of `prompts`, each at the variant's insert layer for it; a
    list in the order of `variants` for each name.

    A repeat goes through all variants, the order turned around each time, so that whatever else slows the
    machine falls on all of them. Warm-up repeats are not counted. Prefill and decode are those of exactly
    `new_tokens` tokens; whole answers, of the first batch, may be `max_new_tokens` long.
    """
    rounds = [(name, repeat) for name in batches for repeat in range(-WARM_UP, repeats)]
    inputs: list[dict[str, torch.Tensor]] = []
    found: dict[str, list[Timing]] = {}
    for name, repeat in progress_bar(rounds, "timing"):
        asked = [prompts[row] for row in batches[name]]
        if name not in found:
            found[name] = [Timing(len(asked), [], [], [], []) for _ in variants]
            inputs = [generation_inputs(variant.backbone, asked) for variant in variants]
        order = list(range(len(variants)))
        for index in order if repeat % 2 == 0 else reversed(order):
            variant, timing = variants[index], found[name][index]
            layers = variant.insert_layers[batches[name]].tolist()
            with variant.backbone.insert_at(layers):
                forwards = time_forwards(variant.backbone, inputs[index], new_tokens)
            choice = time_choice(variant, asked)
            first = name == next(iter(batches))
            whole = time_generation(variant, asked, layers, max_new_tokens) if first else None
            if repeat >= 0:
                timing.prefill_ms.append(forwards.milliseconds[0])
                timing.decode_ms.append(float(np.mean(forwards.milliseconds[1:])))
                timing.choice_ms.append(choice)
                timing.generations.extend([] if whole is None else [whole])
    return found


def time_choice(variant: Variant, prompts: Sequence[Prompt]) -> float:
    """Milliseconds in which a policy chooses the layers of a batch, from its words on; 0 without a policy."""
    if variant.policy is None:
        return 0.0
    started = time.perf_counter()
    variant.policy.layers(variant.backbone, prompts, variant.skip_weight)
    synchronise(variant.backbone.device)
    return 1000 * (time.perf_counter() - started)


def time_generation(
    variant: Variant, prompts: Sequence[Prompt], insert_layers: Sequence[int], max_new_tokens: int
) -> Generation:
    """Answer a batch greedily, as a user would wait for it: layers chosen, images read, tokens made, text."""
    backbone, device = variant.backbone, variant.backbone.device
    model: Any = backbone.model
    before = 0
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    if variant.policy is not None:
        variant.policy.layers(backbone, prompts, variant.skip_weight)
    inputs = generation_inputs(backbone, prompts)
    with backbone.insert_at(insert_layers), torch.inference_mode():
        made = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
    told = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    backbone.tokenizer.batch_decode(made[:, told:], skip_special_tokens=True)
    synchronise(device)
    seconds = time.perf_counter() - started
    special = torch.tensor(backbone.tokenizer.all_special_ids, device=device)
    peak = None
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - before + model.get_memory_footprint()
    return Generation(seconds, int((~torch.isin(made[:, told:], special)).sum()), peak)


def time_forwards(backbone: Backbone, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> Forwards:
    """Generate exactly `new_tokens` tokens for each row, greedily, and time each forward on the way."""
    model: Any = backbone.model
    with timed(backbone) as forwards, torch.inference_mode():
        model.generate(
            **inputs, do_sample=False, num_beams=1, min_new_tokens=new_tokens, max_new_tokens=new_tokens
        )
    return forwards


@contextmanager
def timed(backbone: Backbone) -> Iterator[Forwards]:
    """Time every forward of the model in this block, and weigh the cache that the first one leaves."""
    forwards = Forwards()
    started = 0.0

    def before(module: torch.nn.Module, args: Any) -> None:
        nonlocal started
        synchronise(backbone.device)
        started = time.perf_counter()

    def after(module: torch.nn.Module, args: Any, output: Any) -> None:
        synchronise(backbone.device)
        forwards.milliseconds.append(1000 * (time.perf_counter() - started))
        if len(forwards.milliseconds) == 1:
            forwards.cache_bytes = cache_bytes(output.past_key_values)

    handles = [
        backbone.model.register_forward_pre_hook(before),
        backbone.model.register_forward_hook(after),
    ]
    try:
        yield forwards
    finally:
        for handle in handles:
            handle.remove()


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a `transformers` cache holds."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def measure_cache(
    backbone: Backbone, prompts: Sequence[Prompt], insert_layers: Sequence[int]
) -> list[tuple[int, int]]:
    """Bytes of the cache after the prefill of each prompt alone at its insert layer: measured, and by
    `CostModel`'s formula."""
    costs = CostModel.from_model(backbone.model)
    placeholders = torch.tensor(sorted(backbone.placeholder_ids), device=backbone.device)
    found = []
    for prompt, layer in zip(prompts, insert_layers, strict=True):
        inputs = generation_inputs(backbone, [prompt])
        multimodal = int(torch.isin(inputs["input_ids"], placeholders).sum())
        text = inputs["input_ids"].shape[1] - multimodal
        formula = costs.kv_cache_bytes(text, multimodal, layer)
        with backbone.insert_at(layer):
            found.append((time_forwards(backbone, inputs, 1).cache_bytes, formula))
    return found
