"""How each case is measured: prefill and decoding as users call them, training steps, rows of several layers.

A case says what one run of an arm does and what the FLOPs allow it; `arms.py` takes the turns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deepinsert.backbones import CostModel, deep_insert, insert_at, remove_deep_insert
from deepinsert.backbones.families import base_model_of, placeholder_token_ids
from deepinsert.controller.evaluation import timing
from deepinsert.controller.finetuning.recipe import make_trainable, parameter_groups
from deepinsert.controller.options import FinetuneOptions

from . import ideal_ratios as ideal
from .arms import Clock, Spent, compare, take_turns
from .ideal_ratios import Setting
from .sample_batches import Batch

NEW_TOKENS = 17  # sixteen decoding steps after the prefill
LORA_RANK = 16
METHODS = {"train-full": "full", "train-lora": "lora"}

Advance = Callable[[int], None]
Facts = dict[int, dict[str, Any]]
"""What arms leave behind besides times: bytes of the cache, peak memory."""


def measure(
    case: str,
    model: Any,
    costs: CostModel,
    batch: Batch,
    settings: Sequence[Setting],
    repeats: int,
    advance: Advance = lambda arm: None,
) -> dict[str, list[dict[str, Any]]]:
    """Measure `case` on the batch: for each part (such as `prefill`) a row for the stock model and each
    setting.

    `model` must be unwrapped and is left stock; weights are as before. Rows hold what `arms.compare` gives,
    the `insert_layer`, and where they are known `kv_cache_bytes`, by formula too, and `peak_memory_bytes`.
    """
    everyone: list[Setting] = [None, *settings]
    facts: Facts = {arm: {} for arm in range(len(everyone))}
    with ExitStack() as cleanup:
        cleanup.callback(remove_deep_insert, model)
        if case in METHODS:
            trained, optimizer, projector = cleanup.enter_context(_training(model, METHODS[case]))
            run: Any = partial(_train, trained, optimizer, batch)
            flops: Any = partial(ideal.training_flops, trained, projector, costs, batch)
        else:
            run = partial(_decode if case == "decode" else _prefill, model, batch)
            flops = partial(ideal.decode_flops if case == "decode" else ideal.prefill_flops, costs, batch)
        arms = [partial(_arm, model, setting, run, facts[arm]) for arm, setting in enumerate(everyone)]
        # On a CPU a run is long and little needs warming; a GPU's libraries choose kernels for each shape.
        warm_up = None if model.device.type == "cuda" else sorted({0, len(arms) - 1})
        samples = take_turns(arms, repeats, warm_up, advance)
        allowed = [flops(setting) / flops(None) for setting in everyone]
    return {
        part: [
            {"insert_layer": setting, **row, **facts[arm]}
            for arm, (setting, row) in enumerate(zip(everyone, compare(times, allowed), strict=True))
        ]
        for part, times in samples.items()
    }


def _arm(model: Any, setting: Setting, run: Any, facts: dict[str, Any]) -> Mapping[str, Spent]:
    """One run with the setting in force; putting it in force is not timed."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    if setting is None:
        remove_deep_insert(model)
        spent = run(facts)
    elif isinstance(setting, int):
        deep_insert(model, setting)
        spent = run(facts)
    else:
        with insert_at(deep_insert(model, 0), setting):
            spent = run(facts)
    if on_gpu:
        facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated(model.device)
    return spent


def _prefill(model: Any, batch: Batch, facts: dict[str, Any]) -> dict[str, Spent]:
    """The forward as users call it; the bytes of the cache that it leaves."""
    clock = Clock(model.device)
    with torch.inference_mode():
        start = clock.now()
        output = model(**batch.inputs, **forward_arguments(model))
        spent = clock.since(start)
    facts["kv_cache_bytes"] = timing.cache_bytes(output.past_key_values)
    return {"prefill": spent}


def forward_arguments(model: Any) -> dict[str, Any]:
    """What a prefill is called with besides its inputs: a cache, and logits of the last position alone."""
    keep = "logits_to_keep" in inspect.signature(type(base_model_of(model)).forward).parameters
    return {"use_cache": True, **({"logits_to_keep": 1} if keep else {})}


def _decode(model: Any, batch: Batch, facts: dict[str, Any]) -> dict[str, Spent]:
    """Greedy `generate`: the mean time of a new token after the first, all that `generate` does included."""
    clock = Clock(model.device)
    prefilled: list[Spent] = []

    def forwarded(module: Any, args: Any, output: Any) -> None:
        if not prefilled:
            prefilled.append(clock.now())

    handle = model.register_forward_hook(forwarded)
    try:
        with torch.inference_mode():
            model.generate(
                **batch.inputs,
                do_sample=False,
                num_beams=1,
                min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
                # Random weights might write a placeholder, which has no image to stand for.
                suppress_tokens=sorted(placeholder_token_ids(model.config)),
            )
        spent = clock.since(prefilled[0])
    finally:
        handle.remove()
    return {"decode": spent.over(NEW_TOKENS - 1)}


@contextmanager
def _training(model: Any, method: str) -> Iterator[tuple[Any, torch.optim.Optimizer, int]]:
    """The model as the finetuning recipe trains it, its optimiser at learning rate 0, FLOPs of the projector.

    The rate leaves the weights as they are and takes the same time as any other.
    """
    learned = {name: weight.requires_grad for name, weight in model.named_parameters()}
    projector = ideal.projector_flops(model)
    options = FinetuneOptions(
        out=Path(), data=Path(), method="lora" if method == "lora" else "full", lora_rank=LORA_RANK
    )
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
            weight.requires_grad_(learned[name])


def _train(
    trained: Any, optimizer: torch.optim.Optimizer, batch: Batch, facts: dict[str, Any]
) -> dict[str, Spent]:
    """One step: the loss of every position, backward, optimiser."""
    clock = Clock(base_model_of(trained).device)
    labels = batch.inputs["input_ids"].clone()
    if "attention_mask" in batch.inputs:
        labels[batch.inputs["attention_mask"] == 0] = -100
    start = clock.now()
    trained(**batch.inputs, labels=labels, use_cache=False).loss.backward()
    both = clock.since(start)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"forward_backward": both, "step": clock.since(start)}
