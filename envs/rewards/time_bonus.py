"""Measured prefill time of each insert layer against layer 0, for a skip bonus of time saved.

Measured once and kept with the reward table: a clock read twice would make rewards differ from run to run.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from deepinsert.backbones.loading import to_model

if TYPE_CHECKING:
    from deepinsert.backbones import Backbone
    from deepinsert.envs.prompts import Prompt

WARM_UP = 1


@dataclass(frozen=True)
class Times:
    """Prefill time at K insert layers divided by that at layer 0: medians over rounds, and their quartiles.

    As measured: noise may make a deeper layer look slower than a shallower one, and the quartiles say how
    much of that there was.
    """

    ratios: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def measure_times(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    insert_layers: Sequence[int],
    batch_size: int = 8,
    repeats: int = 15,
    seed: int = 0,
) -> Times:
    """Prefill time at each of `insert_layers` (K) against layer 0, encoder included, as `generate` waits.

    Each of `repeats` rounds draws a batch of `prompts` with the seed and runs it at layer 0 and at every
    candidate, the order turned around each time, so that whatever else slows the machine falls on all of
    them; a ratio is of two times of one round. A warm-up round is not counted. The device is synchronised
    before and after each forward.

    Raises `ValueError` for no prompts, fewer than one repeat, or a layer that the backbone does not have.
    """
    if not prompts:
        raise ValueError("no prompts to measure prefill times on")
    if repeats < 1 or batch_size < 1:
        raise ValueError(f"repeats {repeats!r}, batch_size {batch_size!r}: give at least 1 of each")
    layers = [0, *(layer for layer in insert_layers if layer != 0)]
    rng = np.random.default_rng(seed)
    rounds = []
    for repeat in range(-WARM_UP, repeats):
        batch = [prompts[row] for row in rng.permutation(len(prompts))[:batch_size]]
        inputs = to_model(type(batch[0]).to_generate(backbone.processor, batch), backbone.model)
        order = layers if repeat % 2 == 0 else layers[::-1]
        seconds = {layer: prefill_seconds(backbone, inputs, layer) for layer in order}
        if repeat >= 0:
            rounds.append([seconds[layer] / seconds[0] for layer in insert_layers])
    low, median, high = np.quantile(np.array(rounds), [0.25, 0.5, 0.75], axis=0).tolist()
    return Times(tuple(median), tuple(low), tuple(high))


def prefill_seconds(backbone: Backbone, inputs: Mapping[str, torch.Tensor], insert_layer: int) -> float:
    """Seconds of one forward over a batch that fills a cache, with logits of the last position alone."""
    model = backbone.model
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"use_cache": True, **({"logits_to_keep": 1} if keeps else {})}
    with torch.inference_mode(), backbone.insert_at(insert_layer):
        synchronise(backbone.device)
        started = time.perf_counter()
        model(**inputs, **options)
        synchronise(backbone.device)
        return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was asked for; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
