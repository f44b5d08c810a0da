"""Prompts as a data loader and a `Trainer` take them: a data set, and the collator that makes batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from backbones import Backbone
from envs.prompts import Prompt, encode


class PromptDataset(Dataset[Any]):
    """Prompts as the Trainer's data loader takes them; `placed` gives each with its position."""

    def __init__(self, prompts: Sequence[Prompt], placed: bool = False) -> None:
        self.prompts = prompts
        self.placed = placed

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt | tuple[int, Prompt]:
        return (index, self.prompts[index]) if self.placed else self.prompts[index]


def collator(backbone: Backbone, placed: bool = False) -> Callable[[Sequence[Any]], dict[str, torch.Tensor]]:
    """A function that makes a batch of prompts for the backbone, features in the precision of its weights.

    `placed` prompts come with their position, which goes into the batch as `row_index` (B,) int64.
    """
    dtype = backbone.model.dtype

    def collate(batch: Sequence[Any]) -> dict[str, torch.Tensor]:
        positions, prompts = zip(*batch, strict=True) if placed else ((), batch)
        inputs = encode(backbone.processor, prompts)
        made = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()
        }
        return {**made, "row_index": torch.tensor(positions)} if placed else made

    return collate
