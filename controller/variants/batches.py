"""Prompts as a data loader and a `Trainer` take them: a data set, and the collator that makes batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils.data import Dataset

from backbones import Backbone
from envs.prompts import Prompt, encode


class PromptDataset(Dataset[Prompt]):
    """Prompts as the Trainer's data loader takes them."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]


def collator(backbone: Backbone) -> Callable[[Sequence[Prompt]], dict[str, torch.Tensor]]:
    """A function that makes a batch of prompts for the backbone, features in the precision of its weights."""
    dtype = backbone.model.dtype

    def collate(batch: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        inputs = encode(backbone.processor, batch)
        return {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()
        }

    return collate
