"""Measured time and memory: prefill and decoding of variants in turns, and the bytes of the real KV cache.

Every forward of `generate` is timed where the model is called, and the device is synchronised before and
after it, so the measured time is the time that a user of `generate` waits.
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
    """Measurements of one `generate`."""

    milliseconds: list[float] = field(default_factory=list)
    """The time of each forward: the prefill, then one per further token."""
    cache_bytes: int = 0
    """The bytes of all keys and values after the prefill, for the whole batch."""


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one batch; each list holds one value per repeat, in ms."""

    batch_size: int
    prefill_ms: list[float]
    decode_ms: list[float]
    """The time per new token of the whole batch, as the mean over a repeat's tokens."""
    choice_ms: list[float]
    """The time in which a policy chose the layers, including the processing of texts and images; 0 without a
    policy."""
    generations: list[Generation]
    """Whole answers from `generate`, whatever their length; measured for the first batch only."""


@dataclass(frozen=True)
class Generation:
    """The generation of answers to one batch, from the prompts' texts and images to the answers' texts."""

    seconds: float
    tokens: int
    """Tokens of the answers, without special tokens."""
    peak_bytes: int | None
    """The bytes of this variant's weights and of what the generation adds; None except on CUDA, where the
    allocator counts them."""


def time_variants(
    variants: Sequence[Variant],
    prompts: Sequence[Prompt],
    batches: Mapping[str, NDArray[np.int64]],
    repeats: int,
    max_new_tokens: int,
    new_tokens: int = DECODE_TOKENS,
) -> dict[str, list[Timing]]:
    """Time every variant on each batch, each prompt at the variant's insert layer for it.

    One repeat goes through all variants, and every second repeat in reverse order, so that other load on the
    machine affects all of them. Warm-up repeats are not recorded.

    Args:
        variants: the variants (V).
        prompts: all prompts (P).
        batches: the rows of `prompts` in each batch, by the batch's name.
        repeats: the number of recorded repeats.
        max_new_tokens: the longest whole answer, which is generated for the first batch only.
        new_tokens: the exact number of tokens over which prefill and decoding are timed.

    Returns:
        One timing per variant (V), by the batch's name.
    """
    rounds = [(name, repeat) for name in batches for repeat in range(-WARM_UP, repeats)]
    first_name = next(iter(batches), None)
    inputs: list[dict[str, torch.Tensor]] = []
    timings: dict[str, list[Timing]] = {}
    for name, repeat in progress_bar(rounds, "timing"):
        batch = [prompts[row] for row in batches[name]]
        if name not in timings:
            timings[name] = [Timing(len(batch), [], [], [], []) for _ in variants]
            inputs = [generation_inputs(variant.backbone, batch) for variant in variants]
        order = list(range(len(variants)))
        for index in order if repeat % 2 == 0 else reversed(order):
            variant = variants[index]
            layers = variant.insert_layers[batches[name]].tolist()
            with variant.backbone.insert_at(layers):
                forwards = time_forwards(variant.backbone, inputs[index], new_tokens)
            choice_ms = time_choice(variant, batch)
            is_first = name == first_name
            generation = time_generation(variant, batch, layers, max_new_tokens) if is_first else None
            if repeat >= 0:
                _record(timings[name][index], forwards, choice_ms, generation)
    return timings


def _record(timing: Timing, forwards: Forwards, choice_ms: float, generation: Generation | None) -> None:
    """Append the measurements of one repeat."""
    timing.prefill_ms.append(forwards.milliseconds[0])
    timing.decode_ms.append(float(np.mean(forwards.milliseconds[1:])))
    timing.choice_ms.append(choice_ms)
    if generation is not None:
        timing.generations.append(generation)


def time_choice(variant: Variant, prompts: Sequence[Prompt]) -> float:
    """Return the milliseconds in which a policy chooses the layers of a batch; 0 without a policy."""
    if variant.policy is None:
        return 0.0
    started = time.perf_counter()
    variant.policy.layers(variant.backbone, prompts, variant.skip_weight)
    synchronise(variant.backbone.device)
    return 1000 * (time.perf_counter() - started)


def time_generation(
    variant: Variant, prompts: Sequence[Prompt], insert_layers: Sequence[int], max_new_tokens: int
) -> Generation:
    """Answer a batch greedily and measure the time that a user waits.

    It includes the choice of layers, the reading of images, the generation of tokens and their decoding to
    text.

    Args:
        variant: the variant.
        prompts: the prompts of the batch (B).
        insert_layers: their insert layers (B).
        max_new_tokens: the longest answer.
    """
    backbone, device = variant.backbone, variant.backbone.device
    model: Any = backbone.model
    bytes_before = 0
    if device.type == "cuda":
        bytes_before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    if variant.policy is not None:
        variant.policy.layers(backbone, prompts, variant.skip_weight)
    inputs = generation_inputs(backbone, prompts)
    with backbone.insert_at(insert_layers), torch.inference_mode():
        tokens = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
    prompt_length = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    answers = tokens[:, prompt_length:]
    backbone.tokenizer.batch_decode(answers, skip_special_tokens=True)
    synchronise(device)
    seconds = time.perf_counter() - started
    special = torch.tensor(backbone.tokenizer.all_special_ids, device=device)
    peak = None
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - bytes_before + model.get_memory_footprint()
    return Generation(seconds, int((~torch.isin(answers, special)).sum()), peak)


def time_forwards(backbone: Backbone, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> Forwards:
    """Generate exactly `new_tokens` tokens per row, greedily, and time each forward."""
    model: Any = backbone.model
    with timed(backbone) as forwards, torch.inference_mode():
        model.generate(
            **inputs, do_sample=False, num_beams=1, min_new_tokens=new_tokens, max_new_tokens=new_tokens
        )
    return forwards


@contextmanager
def timed(backbone: Backbone) -> Iterator[Forwards]:
    """Time every forward of the model in this block, and measure the cache after the first one."""
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
    """Return the bytes of the keys and values in a `transformers` cache."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def measure_cache(
    backbone: Backbone, prompts: Sequence[Prompt], insert_layers: Sequence[int]
) -> NDArray[np.float64]:
    """Return the bytes (P, 2) of the KV cache after each prompt's prefill: measured, and by `CostModel`.

    Each of the P prompts is computed alone, at its own insert layer.
    """
    costs = CostModel.from_model(backbone.model)
    placeholders = torch.tensor(sorted(backbone.placeholder_ids), device=backbone.device)
    sizes = []
    for prompt, layer in zip(prompts, insert_layers, strict=True):
        inputs = generation_inputs(backbone, [prompt])
        multimodal = int(torch.isin(inputs["input_ids"], placeholders).sum())
        text = inputs["input_ids"].shape[1] - multimodal
        formula = costs.kv_cache_bytes(text, multimodal, layer)
        with backbone.insert_at(layer):
            sizes.append((time_forwards(backbone, inputs, 1).cache_bytes, formula))
    return np.array(sizes, dtype=np.float64)
