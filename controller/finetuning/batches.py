"""Prompts as a data loader and a `Trainer` take them: a data set, the order of an epoch, and a collator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset, Sampler

from deepinsert.backbones import Backbone
from deepinsert.envs.prompts import IGNORED, Prompt, encode

IMAGE_WORDS = 128  # what an image counts for beside the words of a text, as in LLaVA
GROUPINGS = ("none", "length", "modality-length")


@dataclass(frozen=True)
class Row:
    """A prompt of a batch with its position in the data. One that does not count fills a batch up."""

    prompt: Prompt
    position: int
    counts: bool = True


class PromptDataset(Dataset[Row]):
    """Prompts as the Trainer's data loader takes them. Index `~i` is prompt `i` without loss."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Row:
        position = index if index >= 0 else ~index
        return Row(self.prompts[position], position, counts=index >= 0)


class PromptOrder(Sampler[int]):
    """The order of the prompts in each epoch, which depends on the seed and the epoch alone.

    `batch_size` is that of one process, `accumulation` the batches it adds up for an optimiser step. Which
    prompts a step has is up to chance; a step of n prompts on one process and on several is the same. The
    processes' last batches are filled up with prompts that carry no loss.

    `group_by` "length" puts near lengths into a batch within each step. "modality-length" has batches either
    all with images or all without, and steps too but for an epoch's last, as LLaVA does
    (`LengthGroupedSampler`), which saves padding and keeps processes equally busy.
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
        if group_by not in GROUPINGS:
            raise ValueError(f"--group-by {group_by}: give one of {', '.join(GROUPINGS)}")
        self.count = len(prompts)
        self.lengths = [word_count(prompt) for prompt in prompts] if group_by != "none" else []
        self.with_images = [bool(prompt.images) for prompt in prompts]
        self.group_by = group_by
        self.seed = seed
        self.round = batch_size * processes
        self.step = self.round * accumulation
        self.fill = processes > 1
        self.epoch = 0
        self.length = len(self.order(0))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; accelerate calls this, after a resume too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch))

    def order(self, epoch: int) -> list[int]:
        """Indices into a `PromptDataset` in the order of an epoch."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        shuffled = torch.randperm(self.count, generator=generator).tolist()
        if self.group_by == "none":
            return self._filled(shuffled) if self.fill else shuffled
        groups = [shuffled]
        if self.group_by == "modality-length":
            groups = [[i for i in shuffled if self.with_images[i] is kind] for kind in (True, False)]
        steps, rests = [], []
        for group in groups:
            whole = len(group) - len(group) % self.step
            steps += [
                self._by_length(group[start : start + self.step]) for start in range(0, whole, self.step)
            ]
            rests += [self._by_length(group[whole:])] if group[whole:] else []
        chosen = torch.randperm(len(steps), generator=generator).tolist()
        order = [index for step in chosen for index in steps[step]]
        for number, rest in enumerate(rests, start=1):
            order += self._filled(rest) if self.fill or number < len(rests) else rest
        return order

    def _by_length(self, indices: list[int]) -> list[int]:
        return sorted(indices, key=lambda index: -self.lengths[index])

    def _filled(self, indices: list[int]) -> list[int]:
        """`indices` with as many that carry no loss as whole batches on every process need."""
        return indices + [~indices[-1]] * (-len(indices) % self.round)


def word_count(prompt: Prompt) -> int:
    """A cheap measure of a prompt's length: its words, and 128 for each image."""
    texts = [part["text"] for message in prompt.messages for part in message["content"] if "text" in part]
    return sum(len(text.split()) for text in texts) + IMAGE_WORDS * len(prompt.images)


def collator(backbone: Backbone, placed: bool = False) -> Callable[[Sequence[Row]], dict[str, torch.Tensor]]:
    """A function that makes a batch of rows for the backbone, features in the precision of its weights.

    With `placed` the batch holds the prompts' positions too, as `row_index` (B,) int64.
    """
    dtype = backbone.model.dtype

    def collate(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        inputs = encode(backbone.processor, [row.prompt for row in rows])
        batch = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()
        }
        batch["labels"][[number for number, row in enumerate(rows) if not row.counts]] = IGNORED
        return {**batch, "row_index": torch.tensor([row.position for row in rows])} if placed else batch

    return collate
