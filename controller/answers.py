"""What a backbone says to prompts at its insert layer in force: greedy answers, losses, FLOPs.

In batches, with progress shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backbones import Backbone
from envs.block_forward import BlockForward, to_model
from envs.prompts import Prompt, encode

from .runs import progress


def generate_answers(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    batch_size: int = 32,
    max_new_tokens: int = 32,
    label: str = "answers",
) -> list[str]:
    """The answer that greedy decoding gives to each prompt (P), at most `max_new_tokens` long."""
    model: Any = backbone.model
    answers: list[str] = []
    for start in progress(range(0, len(prompts), batch_size), label):
        inputs = generation_inputs(backbone, prompts[start : start + batch_size])
        with torch.inference_mode():
            tokens = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in backbone.tokenizer.batch_decode(new, skip_special_tokens=True)]
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
    return to_model(
        encode(backbone.processor, prompts, with_answers=False, padding_side="left"), backbone.model
    )
