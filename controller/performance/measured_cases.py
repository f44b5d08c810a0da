"""Measures each case: prefill and decoding as users call them, training steps, rows with several layers.

A case defines one run of an arm and the time ratio that the FLOPs allow; `arms.py` runs the arms in turns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from deepinsert.backbones import CostModel, deep_insert, insert_at, remove_deep_insert
from deepinsert.backbones.families import base_model_of, placeholder_token_ids
from deepinsert.controller.evaluation import timing
from deepinsert.controller.finetuning.recipe import make_trainable, parameter_groups
from deepinsert.controller.options import FinetuneOptions

from . import ideal_ratios as ideal
from .arms import Clock, Duration, compare, take_turns
from .ideal_ratios import Setting
from .sample_batches import Batch

NEW_TOKENS = 17
"""Tokens to generate: the first one and sixteen decoding steps."""
LORA_RANK = 16
METHODS: dict[str, Literal["full", "lora"]] = {"train-full": "full", "train-lora": "lora"}

Advance = Callable[[int], None]
MemoryFigures = dict[str, Any]
"""Bytes that an arm's last run measured beside its time: `kv_cache_bytes`, `peak_memory_bytes`."""
Run = Callable[[MemoryFigures], Mapping[str, Duration]]
"""One run of a case on the model as it is; it writes its memory figures and returns its durations."""


def measure(
    case: str,
    model: Any,
    costs: CostModel,
    batch: Batch,
    settings: Sequence[Setting],
    repeats: int,
    advance: Advance = lambda arm: None,
) -> dict[str, list[dict[str, Any]]]:
    """Measure `case` on the batch, and return a row for the stock model and each setting, per part.

    A row holds the results of `arms.compare`, the `insert_layer`, and where they are measured
    `kv_cache_bytes` and `peak_memory_bytes`.

    Args:
        case: one of the cases of `deepinsert bench`.
        model: the stock model, not wrapped; it is stock again afterwards, with the same weights.
        costs: the model's costs.
        batch: the batch to measure with.
        settings: insert layers to measure beside the stock model.
        repeats: the number of rounds.
        advance: is called after each run, with the index of its arm; 0 is the stock model.
    """
    all_settings: list[Setting] = [None, *settings]
    memory: list[MemoryFigures] = [{} for _ in all_settings]
    with ExitStack() as cleanup:
        cleanup.callback(remove_deep_insert, model)
        if case in METHODS:
            trained, optimizer, projector = cleanup.enter_context(_prepared_training(model, METHODS[case]))
            run: Run = partial(_train, trained, optimizer, batch)
            flops: Any = partial(ideal.training_flops, trained, projector, costs, batch)
        else:
            run = partial(_decode if case == "decode" else _prefill, model, batch)
            flops = partial(ideal.decode_flops if case == "decode" else ideal.prefill_flops, costs, batch)
        arms = [
            partial(_run_at, model, setting, run, figures)
            for setting, figures in zip(all_settings, memory, strict=True)
        ]
        # On a CPU a run is long and needs little warm-up; a GPU's libraries choose kernels per shape.
        warm_up = None if model.device.type == "cuda" else sorted({0, len(arms) - 1})
        samples = take_turns(arms, repeats, warm_up, advance)
        ideal_ratios = [flops(setting) / flops(None) for setting in all_settings]
    return {
        part: [
            {"insert_layer": setting, **row, **figures}
            for setting, row, figures in zip(all_settings, compare(times, ideal_ratios), memory, strict=True)
        ]
        for part, times in samples.items()
    }


def _run_at(model: Any, setting: Setting, run: Run, figures: MemoryFigures) -> Mapping[str, Duration]:
    """Run once at a setting; setting the insert layer is not timed."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    if setting is None:
        remove_deep_insert(model)
        durations = run(figures)
    elif isinstance(setting, int):
        deep_insert(model, setting)
        durations = run(figures)
    else:
        with insert_at(deep_insert(model, 0), setting):
            durations = run(figures)
    if on_gpu:
        figures["peak_memory_bytes"] = torch.cuda.max_memory_allocated(model.device)
    return durations


def _prefill(model: Any, batch: Batch, figures: MemoryFigures) -> dict[str, Duration]:
    """Time the forward as users call it, and count the bytes of its cache."""
    clock = Clock(model.device)
    with torch.inference_mode():
        start = clock.now()
        output = model(**batch.inputs, **forward_arguments(model))
        duration = clock.since(start)
    figures["kv_cache_bytes"] = timing.cache_bytes(output.past_key_values)
    return {"prefill": duration}


def forward_arguments(model: Any) -> dict[str, Any]:
    """Return the arguments of a prefill besides its inputs: a cache, and only the last position's logits."""
    has_argument = "logits_to_keep" in inspect.signature(type(base_model_of(model)).forward).parameters
    return {"use_cache": True, **({"logits_to_keep": 1} if has_argument else {})}


def _decode(model: Any, batch: Batch, figures: MemoryFigures) -> dict[str, Duration]:
    """Time greedy `generate`: the mean per new token after the first, with all that `generate` does."""
    clock = Clock(model.device)
    prefill_ends: list[Duration] = []

    def note_prefill_end(module: Any, args: Any, output: Any) -> None:
        if not prefill_ends:
            prefill_ends.append(clock.now())

    handle = model.register_forward_hook(note_prefill_end)
    try:
        with torch.inference_mode():
            model.generate(
                **batch.inputs,
                do_sample=False,
                num_beams=1,
                min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
                # A model with random weights might generate a placeholder, for which there is no image.
                suppress_tokens=sorted(placeholder_token_ids(model.config)),
            )
        duration = clock.since(prefill_ends[0])
    finally:
        handle.remove()
    return {"decode": duration.mean_of(NEW_TOKENS - 1)}


@contextmanager
def _prepared_training(
    model: Any, method: Literal["full", "lora"]
) -> Iterator[tuple[Any, torch.optim.Optimizer, int]]:
    """Yield the model as the recipe trains it, its optimiser, and the projectors' FLOPs per token.

    The learning rate is 0: it leaves the weights as they are and takes the same time as any other.
    """
    requires_grad = {name: weight.requires_grad for name, weight in model.named_parameters()}
    projector = ideal.projector_flops(model)
    options = FinetuneOptions(out=Path(), data=Path(), method=method, lora_rank=LORA_RANK)
    trained = make_trainable(model, options).train()
    optimizer = torch.optim.AdamW(parameter_groups(trained, 0.0))
    try:
        yield trained, optimizer, projector
    finally:
        optimizer.zero_grad(set_to_none=True)
        if trained is not model:
            trained.unload()
        model.eval()
        for name, weight in model.named_parameters():
            weight.requires_grad_(requires_grad[name])


def _train(
    trained: Any, optimizer: torch.optim.Optimizer, batch: Batch, figures: MemoryFigures
) -> dict[str, Duration]:
    """Time one training step: forward with the loss at every position, backward, optimiser."""
    clock = Clock(base_model_of(trained).device)
    labels = batch.inputs["input_ids"].clone()
    if "attention_mask" in batch.inputs:
        labels[batch.inputs["attention_mask"] == 0] = -100
    start = clock.now()
    trained(**batch.inputs, labels=labels, use_cache=False).loss.backward()
    forward_backward = clock.since(start)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"forward_backward": forward_backward, "step": clock.since(start)}
