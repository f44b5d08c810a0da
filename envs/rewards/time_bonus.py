"""Measures the prefill time of each insert layer relative to layer 0, for a skip bonus of saved time.

Times are measured once and stored with the run, since new measurements would change the rewards.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

from deepinsert.backbones import Backbone
from deepinsert.backbones.loading import to_model
from deepinsert.envs.prompts import Prompt

WARM_UP = 1
"""Rounds before the first one that counts."""


@dataclass(frozen=True)
class Times:
    """Prefill times at K insert layers divided by the time at layer 0.

    They are not smoothed: noise may make a deeper layer look slower than a shallower one. The quartiles show
    the size of the noise.

    Attributes:
        ratios: (K), medians over rounds.
        low: (K), lower quartiles.
        high: (K), upper quartiles.
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
    """Measure the prefill time of generation, encoder included, relative to layer 0.

    Each round draws a batch of prompts and runs it at layer 0 and at every candidate. The order alternates
    between rounds, so that other load on the machine slows all layers alike; a ratio compares two times of
    one round. The warm-up round does not count. The device is synchronised before and after each forward.

    Args:
        backbone: the backbone.
        prompts: the prompts from which batches are drawn.
        insert_layers: the K candidates.
        batch_size: prompts per batch.
        repeats: the number of rounds.
        seed: the seed of the drawn batches.

    Raises:
        ValueError: if there are no prompts, if there is less than one repeat or prompt per batch, or if the
            backbone does not have a layer.
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
        inputs = to_model(Prompt.to_generate(backbone.processor, batch), backbone.model)
        order = layers if repeat % 2 == 0 else layers[::-1]
        seconds = {layer: prefill_seconds(backbone, inputs, layer) for layer in order}
        if repeat >= 0:
            rounds.append([seconds[layer] / seconds[0] for layer in insert_layers])
    low, median, high = np.quantile(np.array(rounds), [0.25, 0.5, 0.75], axis=0).tolist()
    return Times(tuple(median), tuple(low), tuple(high))


def prefill_seconds(backbone: Backbone, inputs: Mapping[str, torch.Tensor], insert_layer: int) -> float:
    """Return the seconds of one forward that fills a KV cache, with logits at the last position only."""
    model = backbone.model
    has_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"use_cache": True, **({"logits_to_keep": 1} if has_logits_to_keep else {})}
    with torch.inference_mode(), backbone.insert_at(insert_layer):
        synchronise(backbone.device)
        start = perf_counter()
        model(**inputs, **options)
        synchronise(backbone.device)
        return perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished its work; on a CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
