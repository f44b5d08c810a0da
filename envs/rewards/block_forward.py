"""Losses and costs of a block of prompts, encoded once and run at one insert layer after the other."""

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
    """Runs blocks of prompts through the backbone: encoded once, then at one insert layer after the other."""

    def __init__(self, backbone: Backbone, prompts: Sequence[Prompt]) -> None:
        self.backbone = backbone
        self.prompts = prompts
        # The head is most models' widest matrix: where the model lets us, it runs on the answers alone.
        self.keeps_logits = "logits_to_keep" in inspect.signature(backbone.model.forward).parameters

    def encode(self, rows: slice) -> dict[str, torch.Tensor]:
        """Model inputs of the prompts `rows` on the backbone's device, padded right, with `labels`."""
        return to_model(encode(self.backbone.processor, self.prompts[rows]), self.backbone.model)

    def losses(self, inputs: Mapping[str, torch.Tensor], insert_layer: int | Sequence[int]) -> FloatArray:
        """Loss in nats of each prompt of an encoded block, (rows,), at one layer or one for each."""
        with torch.inference_mode():
            return answer_loss(*self.logits(inputs, insert_layer)).double().cpu().numpy()

    def logits(
        self, inputs: Mapping[str, torch.Tensor], insert_layer: int | Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (rows, A, V) and labels (rows, A) of an encoded block, from its first answer on."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        answered = (labels != IGNORED).any(dim=0).nonzero()
        first = max(int(answered[0]) - 1, 0) if len(answered) else 0
        tail = labels.shape[1] - first
        if self.keeps_logits:
            inputs["logits_to_keep"] = tail  # type: ignore[assignment]
        with self.backbone.insert_at(insert_layer):
            logits = self.backbone.model(**inputs, use_cache=False).logits
        return logits[:, -tail:], labels[:, -tail:]

    def flops(
        self, rows: slice, inputs: Mapping[str, torch.Tensor], insert_layers: Sequence[int]
    ) -> FloatArray:
        """FLOPs (rows, layers) of the prefill that `generate` makes of an encoded block's prompts."""
        return prefill_flops(self.costs, self.prompts[rows], *self.count_tokens(inputs), insert_layers)

    @cached_property
    def costs(self) -> CostModel:
        """What the backbone's modules cost."""
        return CostModel.from_model(self.backbone.model)

    def count_tokens(self, inputs: Mapping[str, torch.Tensor]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Text and multimodal tokens of each prompt up to where its last answer begins, if it has labels."""
        before = inputs["attention_mask"].bool()
        if "labels" in inputs:
            answered = inputs["labels"] != IGNORED
            begins = answered & ~torch.nn.functional.pad(answered, (1, 0))[:, :-1]
            place = torch.arange(answered.shape[1], device=answered.device)
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
    """FLOPs (prompts, layers) of the prefill that `generate` makes of prompts with so many tokens."""
    counted: dict[tuple[int, int, int], list[float]] = {}
    found = []
    for prompt, text, multimodal in zip(prompts, text_tokens, multimodal_tokens, strict=True):
        key = (int(text), int(multimodal), len(prompt.images))
        if key not in counted:
            counted[key] = [
                float(costs.prefill_flops(*key[:2], layer, images=key[2], logits_to_keep=1))
                for layer in insert_layers
            ]
        found.append(counted[key])
    return np.array(found)
