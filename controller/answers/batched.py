"""What a backbone says to prompts, each at its own insert layer: greedy answers, losses, FLOPs.

In batches, with progress shown.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from deepinsert.backbones import Backbone
from deepinsert.backbones.loading import to_model
from deepinsert.controller.runs.folder import progress
from deepinsert.envs.prompts import Prompt
from deepinsert.envs.rewards.block_forward import BlockForward


def generate_answers(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    insert_layers: Sequence[int],
    batch_size: int = 32,
    max_new_tokens: int = 32,
    label: str = "answers",
) -> list[str]:
    """The answer that greedy decoding gives to each prompt (P) at its insert layer (P), at most
    `max_new_tokens` long."""
    answers: list[str] = []
    for start in progress(range(0, len(prompts), batch_size), label):
        rows = slice(start, start + batch_size)
        answers += backbone.generate(
            prompts[rows],
            insert_layer=insert_layers[rows],
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        )
    return answers


def losses_and_flops(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    insert_layers: Sequence[int],
    batch_size: int = 32,
    label: str = "loss",
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Loss (P) of each prompt's answer in nats at its insert layer (P), NaN where it has none, and prefill
    FLOPs (P, 2) there and at layer 0."""
    own = np.array(insert_layers)
    answered = np.array([bool(prompt.answer) for prompt in prompts])
    losses, flops = np.full(len(prompts), np.nan), np.empty((len(prompts), 2))
    for known in (True, False):
        where = np.flatnonzero(answered == known)
        forward = BlockForward(backbone, [prompts[int(row)] for row in where])
        starts = range(0, len(where), batch_size)
        for start in progress(starts, label if known else f"{label}, no reference") if len(where) else ():
            rows, part = where[start : start + batch_size], slice(start, start + batch_size)
            inputs = forward.encode(part) if known else generation_inputs(backbone, forward.prompts[part])
            layers, column = np.unique([0, *own[rows]], return_inverse=True)
            costs = forward.flops(part, inputs, layers.tolist())
            flops[rows] = np.stack([costs[np.arange(len(rows)), column[1:]], costs[:, 0]], axis=1)
            if known:
                losses[rows] = forward.losses(inputs, own[rows].tolist())
    return losses, flops


def generation_inputs(backbone: Backbone, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
    """Inputs for `generate`: padded left, ending where the answer begins, on the backbone's device."""
    return to_model(Prompt.to_generate(backbone.processor, prompts), backbone.model)
