"""Greedy answers, losses and FLOPs of a backbone in batches, each prompt at its own insert layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from deepinsert.backbones import Backbone
from deepinsert.backbones.loading import to_model
from deepinsert.controller.runs.progress_bars import progress_bar
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
    """Generate the greedy answer to each of P prompts at its insert layer.

    Args:
        backbone: the backbone that answers.
        prompts: the P prompts.
        insert_layers: the insert layer of each prompt (P).
        batch_size: prompts per call of the model.
        max_new_tokens: the largest number of tokens in an answer.
        label: the text before the progress bar.

    Returns:
        The answers, in the order of the prompts.
    """
    answers: list[str] = []
    for start in progress_bar(range(0, len(prompts), batch_size), label):
        batch = slice(start, start + batch_size)
        answers += backbone.generate(
            prompts[batch],
            insert_layer=insert_layers[batch],
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
    """Compute the loss and the prefill FLOPs of each of P prompts at its insert layer.

    Args:
        backbone: the backbone to run.
        prompts: the P prompts, with or without references.
        insert_layers: the insert layer of each prompt (P).
        batch_size: prompts per call of the model.
        label: the text before the progress bar.

    Returns:
        The losses (P) in nats, NaN for prompts without a reference, and the FLOPs (P, 2): at the prompt's own
        insert layer and at layer 0.
    """
    layers = np.array(insert_layers)
    has_reference = np.array([bool(prompt.answer) for prompt in prompts])
    losses, flops = np.full(len(prompts), np.nan), np.empty((len(prompts), 2))
    for with_reference in (True, False):
        rows = np.flatnonzero(has_reference == with_reference)
        if not len(rows):
            continue
        forward = BlockForward(backbone, [prompts[int(row)] for row in rows])
        bar_label = label if with_reference else f"{label}, no reference"
        for start in progress_bar(range(0, len(rows), batch_size), bar_label):
            batch_rows, batch = rows[start : start + batch_size], slice(start, start + batch_size)
            if with_reference:
                inputs = forward.encode(batch)
                losses[batch_rows] = forward.losses(inputs, layers[batch_rows].tolist())
            else:
                inputs = generation_inputs(backbone, forward.prompts[batch])
            flops[batch_rows] = _flops_here_and_stock(forward, batch, inputs, layers[batch_rows])
    return losses, flops


def _flops_here_and_stock(
    forward: BlockForward, batch: slice, inputs: dict[str, torch.Tensor], layers: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the prefill FLOPs (B, 2) of the rows of `batch` at their insert layers (B) and at layer 0."""
    candidates, columns = np.unique([0, *layers], return_inverse=True)
    costs = forward.flops(batch, inputs, candidates.tolist())
    return np.stack([costs[np.arange(len(layers)), columns[1:]], costs[:, 0]], axis=1)


def generation_inputs(backbone: Backbone, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
    """Return inputs for `generate` on the model's device: padded left, ending where the answer begins."""
    return to_model(Prompt.to_generate(backbone.processor, prompts), backbone.model)
