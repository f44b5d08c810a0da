"""Losses of all questions about one image at many insert layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from backbones import Backbone

from .block_forward import BlockForward
from .prompts import IGNORED, Prompt, answer_loss


@dataclass(frozen=True)
class GroupResult:
    """What P prompts cost at K insert layers.

    `losses` (P, K) are the answers' mean next-token negative log-likelihoods in nats. `first_tokens` (P, K)
    are the most probable first tokens of the answers; `greedy` (P, K) whether every labelled token, the end of
    the turn included, is the most probable one. `text_tokens` and `multimodal_tokens` (P,) count the prompt
    up to where its last answer begins.
    """

    losses: NDArray[np.float64]
    first_tokens: NDArray[np.int64]
    greedy: NDArray[np.bool_]
    text_tokens: NDArray[np.int64]
    multimodal_tokens: NDArray[np.int64]


class GroupForward:
    """Runs prompts that share images through the backbone, at many insert layers."""

    def __init__(self, backbone: Backbone, batch_tokens: int = 8192) -> None:
        self.backbone = backbone
        self.batch_tokens = batch_tokens

    def run(self, prompts: Sequence[Prompt], insert_layers: Sequence[int]) -> GroupResult:
        """The prompts, which are about the same images, at each of `insert_layers`."""
        forward = BlockForward(self.backbone, prompts)
        inputs = forward.encode(slice(None))
        labels = inputs["labels"]
        given = {name: value for name, value in inputs.items() if name != "labels"}
        losses, first, greedy = [], [], []
        for layer in insert_layers:
            with torch.inference_mode(), self.backbone.insert_at(layer):
                logits = self.backbone.model(**given, use_cache=False).logits
                losses.append(answer_loss(logits, labels).double().cpu().numpy())
            best, targets = logits[:, :-1].argmax(dim=-1), labels[:, 1:]
            kept = targets != IGNORED
            greedy.append(((best == targets) | ~kept).all(dim=1).cpu().numpy())
            first.append(best.gather(1, kept.int().argmax(dim=1, keepdim=True))[:, 0].cpu().numpy())
        text, multimodal = forward.count_tokens(inputs)
        return GroupResult(np.stack(losses, 1), np.stack(first, 1), np.stack(greedy, 1), text, multimodal)
