"""Computes losses and FLOPs of a block of prompts, which is encoded once and run at many insert layers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from deepinsert.backbones import Backbone, CostModel
from deepinsert.backbones.loading import to_model
from deepinsert.envs.prompts import IGNORED, Prompt, answer_loss, encode

FloatArray = NDArray[np.float64]


class BlockForward:
    """Runs blocks of prompts through the backbone: a block is encoded once and run at many insert layers."""

    def __init__(self, backbone: Backbone, prompts: Sequence[Prompt]) -> None:
        self.backbone = backbone
        self.prompts = prompts
        # The head is the widest matrix of most models; if the model supports it, it runs only on the answers.
        self.has_logits_to_keep = "logits_to_keep" in inspect.signature(backbone.model.forward).parameters

    def encode(self, rows: slice) -> dict[str, torch.Tensor]:
        """Return the inputs of the prompts `rows`, with `labels`, padded right, on the model's device."""
        return to_model(encode(self.backbone.processor, self.prompts[rows]), self.backbone.model)

    def losses(self, inputs: Mapping[str, torch.Tensor], insert_layer: int | Sequence[int]) -> FloatArray:
        """Return the loss in nats of each prompt of a block, (B,), at one insert layer or one per prompt."""
        with torch.inference_mode():
            return answer_loss(*self.logits(inputs, insert_layer)).double().cpu().numpy()

    def logits(
        self, inputs: Mapping[str, torch.Tensor], insert_layer: int | Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits (B, A, V) and labels (B, A) of a block, from its first labelled token on."""
        model_inputs = {name: value for name, value in inputs.items() if name != "labels"}
        labels = inputs["labels"]
        labelled = (labels != IGNORED).any(dim=0).nonzero()
        first = max(int(labelled[0]) - 1, 0) if len(labelled) else 0
        tail = labels.shape[1] - first
        options = {"logits_to_keep": tail} if self.has_logits_to_keep else {}
        with self.backbone.insert_at(insert_layer):
            logits = self.backbone.model(**model_inputs, **options, use_cache=False).logits
        return logits[:, -tail:], labels[:, -tail:]

    def flops(
        self, rows: slice, inputs: Mapping[str, torch.Tensor], insert_layers: Sequence[int]
    ) -> FloatArray:
        """Return the prefill FLOPs (B, K) of generation from a block's prompts at K insert layers.

        Args:
            rows: the prompts of the block.
            inputs: the block, as `encode` returns it.
            insert_layers: the K insert layers.
        """
        return prefill_flops(self.costs, self.prompts[rows], *self.count_tokens(inputs), insert_layers)

    @cached_property
    def costs(self) -> CostModel:
        """The costs of the backbone's modules."""
        return CostModel.from_model(self.backbone.model)

    def count_tokens(self, inputs: Mapping[str, torch.Tensor]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Count the text and the multimodal tokens of each prompt, (B,) each.

        If there are labels, only tokens before the last answer count.
        """
        before = inputs["attention_mask"].bool()
        if "labels" in inputs:
            labelled = inputs["labels"] != IGNORED
            begins = labelled & ~torch.nn.functional.pad(labelled, (1, 0))[:, :-1]
            place = torch.arange(labelled.shape[1], device=labelled.device)
            before = before & (place < torch.where(begins, place, -1).amax(dim=1, keepdim=True))
        placeholders = torch.tensor(sorted(self.backbone.placeholder_ids), device=before.device)
        multimodal = before & torch.isin(inputs["input_ids"], placeholders)
        return (before & ~multimodal).sum(dim=1).cpu().numpy(), multimodal.sum(dim=1).cpu().numpy()


def prefill_flops(
    costs: CostModel,
    prompts: Sequence[Prompt],
    text_tokens: NDArray[np.int64],
    multimodal_tokens: NDArray[np.int64],
    insert_layers: Sequence[int],
) -> FloatArray:
    """Return the prefill FLOPs (P, K) of generation, with logits at the last position only.

    Args:
        costs: the costs of the model's modules.
        prompts: the P prompts, whose images are counted.
        text_tokens: their text tokens (P,).
        multimodal_tokens: their multimodal tokens (P,).
        insert_layers: the K insert layers.
    """
    flops_of: dict[tuple[int, int, int], list[float]] = {}
    rows = []
    for prompt, text, multimodal in zip(prompts, text_tokens, multimodal_tokens, strict=True):
        key = (int(text), int(multimodal), len(prompt.images))
        if key not in flops_of:
            flops_of[key] = [
                float(costs.prefill_flops(*key[:2], layer, images=key[2], logits_to_keep=1))
                for layer in insert_layers
            ]
        rows.append(flops_of[key])
    return np.array(rows)
