"""What a backbone says to prompts at its insert layer in force: greedy answers, losses, FLOPs.

In batches, with progress shown.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from backbones import Backbone
from backbones.loading import to_model
from envs.block_forward import BlockForward
from envs.prompts import Prompt

from .runs import progress


def generate_answers(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    batch_size: int = 32,
    max_new_tokens: int = 32,
    label: str = "answers",
    insert_layers: Sequence[int] | None = None,
) -> list[str]:
    """The answer that greedy decoding gives to each prompt (P), at most `max_new_tokens` long.

    `insert_layers` (P) has a layer for each prompt; by default all have the one in force.
    """
    answers: list[str] = []
    for start in progress(range(0, len(prompts), batch_size), label):
        rows = slice(start, start + batch_size)
        own = None if insert_layers is None else insert_layers[rows]
        answers += backbone.generate(
            prompts[rows], insert_layer=own, batch_size=batch_size, max_new_tokens=max_new_tokens
        )
    return answers


def losses_and_flops(
    backbone: Backbone, prompts: Sequence[Prompt], batch_size: int = 32, label: str = "loss"
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Loss (P) of each prompt's answer in nats, and prefill FLOPs (P, 2) at the layer in force and at 0."""
    forward = BlockForward(backbone, prompts)
    losses, flops = [], []
    for start in progress(range(0, len(prompts), batch_size), label):
        rows = slice(start, start + batch_size)
        inputs = forward.encode(rows)
        losses.append(forward.losses(inputs, backbone.insert_layer))
        flops.append(forward.flops(rows, inputs, (backbone.insert_layer, 0)))
    return np.concatenate(losses), np.concatenate(flops)


def generation_inputs(backbone: Backbone, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
    """Inputs for `generate`: padded left, ending where the answer begins, on the backbone's device."""
    return to_model(Prompt.to_generate(backbone.processor, prompts), backbone.model)
