"""Prompts for a `Trainer`: a data set, the order of the prompts in an epoch, and a collator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset, Sampler

from deepinsert.backbones import Backbone
from deepinsert.envs.prompts import IGNORED, Prompt, encode

IMAGE_WORDS = 128
"""The length of an image in words of text, as in LLaVA."""
GROUPINGS = ("none", "length", "modality-length")


@dataclass(frozen=True)
class Row:
    """A prompt of a batch with its position in the data; rows without loss only fill the batch."""

    prompt: Prompt
    position: int
    has_loss: bool = True


class PromptDataset(Dataset[Row]):
    """Prompts for the Trainer's data loader. Index `~i` is prompt `i` without loss."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Row:
        position = index if index >= 0 else ~index
        return Row(self.prompts[position], position, has_loss=index >= 0)


class PromptOrder(Sampler[int]):
    """The order of the prompts in each epoch, which depends on the seed and the epoch alone.

    The prompts of an optimiser step are drawn at random, and they are the same on any number of processes.
    The processes' last batches are filled with prompts without loss.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int,
        batch_size: int,
        processes: int = 1,
        accumulation: int = 1,
        group_by: str = "none",
    ) -> None:
        """Prepare the order.

        Args:
            prompts: the prompts of the data set.
            seed: decides the order, together with the epoch.
            batch_size: prompts per batch of one process.
            processes: the number of processes that train together.
            accumulation: batches of each process per optimiser step.
            group_by: "none" keeps the random order. "length" puts prompts of similar length into a batch,
                within
                each step. "modality-length" also makes batches either all with or all without images, and
                steps too except the last of an epoch; this saves padding and balances the processes
                (LLaVA's `LengthGroupedSampler`).

        Raises:
            ValueError: `group_by` is another word.
        """
        if group_by not in GROUPINGS:
            raise ValueError(f"--group-by {group_by}: give one of {', '.join(GROUPINGS)}")
        self.count = len(prompts)
        self.lengths = [word_count(prompt) for prompt in prompts] if group_by != "none" else []
        self.with_images = [bool(prompt.images) for prompt in prompts]
        self.group_by = group_by
        self.seed = seed
        self.joint_batch_size = batch_size * processes
        self.step_size = self.joint_batch_size * accumulation
        self.fills_batches = processes > 1
        self.epoch = 0
        self.length = len(self.order(0))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; accelerate calls this, also after a resume."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch))

    def order(self, epoch: int) -> list[int]:
        """Return the indices into a `PromptDataset` in the order of an epoch."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        shuffled = torch.randperm(self.count, generator=generator).tolist()
        if self.group_by == "none":
            return self._filled(shuffled) if self.fills_batches else shuffled
        groups = [shuffled]
        if self.group_by == "modality-length":
            groups = [[i for i in shuffled if self.with_images[i] is kind] for kind in (True, False)]
        steps, remainders = [], []
        for group in groups:
            end = len(group) - len(group) % self.step_size
            steps += [
                self._by_length(group[start : start + self.step_size])
                for start in range(0, end, self.step_size)
            ]
            remainders += [self._by_length(group[end:])] if group[end:] else []
        step_order = torch.randperm(len(steps), generator=generator).tolist()
        order = [index for step in step_order for index in steps[step]]
        for number, remainder in enumerate(remainders, start=1):
            must_fill = self.fills_batches or number < len(remainders)
            order += self._filled(remainder) if must_fill else remainder
        return order

    def _by_length(self, indices: list[int]) -> list[int]:
        """Return `indices`, the longest prompts first."""
        return sorted(indices, key=lambda index: -self.lengths[index])

    def _filled(self, indices: list[int]) -> list[int]:
        """Return `indices` with prompts without loss up to a whole batch on every process."""
        return indices + [~indices[-1]] * (-len(indices) % self.joint_batch_size)


def word_count(prompt: Prompt) -> int:
    """Return a cheap measure of a prompt's length: its words, and `IMAGE_WORDS` per image."""
    texts = [part["text"] for message in prompt.messages for part in message["content"] if "text" in part]
    return sum(len(text.split()) for text in texts) + IMAGE_WORDS * len(prompt.images)


def collator(
    backbone: Backbone, with_positions: bool = False
) -> Callable[[Sequence[Row]], dict[str, torch.Tensor]]:
    """Return a function that turns B rows into model inputs.

    Features get the dtype of the backbone's weights. `with_positions` adds the prompts' positions in the
    data, as `row_index` (B,) int64.
    """
    dtype = backbone.model.dtype

    def collate(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        inputs = encode(backbone.processor, [row.prompt for row in rows])
        batch = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()
        }
        batch["labels"][[number for number, row in enumerate(rows) if not row.has_loss]] = IGNORED
        if with_positions:
            batch["row_index"] = torch.tensor([row.position for row in rows])
        return batch

    return collate
