"""Groups prompts about the same images: each prompt is tokenised, the images are processed once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers.processing_utils import ProcessorMixin

from deepinsert.envs.chat_text import placeholder_ids_of, plain_tokens, writes_bos
from deepinsert.envs.prompts import ImageRef, Prompt, chat_texts, encode


@dataclass(frozen=True)
class GroupPrompts:
    """P prompts with the same tokens and images up to the last multimodal token: their common prefix.

    Attributes:
        members: the prompts' indices among all prompts of the call.
        inputs: the model's inputs for the longest of them, with B = 1 and without labels.
        prefix: the number of tokens of the prefix.
        texts: for each prompt, the token ids after the prefix up to the last labelled token.
        answers: for each prompt, the positions of the labelled tokens in its text, ascending.
    """

    members: list[int]
    inputs: dict[str, Tensor]
    prefix: int
    texts: list[list[int]]
    answers: list[list[int]]

    @property
    def layout(self) -> Hashable:
        """A key, equal for groups that can be rows of one batch: they differ only in features' values."""
        shapes = tuple(
            (name, *value.shape[1:]) for name, value in self.inputs.items() if value.is_floating_point()
        )
        return (*self.inputs["input_ids"][0, : self.prefix].tolist(), shapes)


def group_prompts(processor: ProcessorMixin, prompts: Sequence[Prompt]) -> list[GroupPrompts]:
    """Group the prompts by their images and prefix, in the order of the groups' first members.

    Prompts without an image, and prompts with loss on an answer before the last image, are in no group.
    """
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    placeholders = placeholder_ids_of(processor, tokenizer)
    marked = chat_texts(processor, prompts)
    arguments = {"add_special_tokens": not writes_bos(tokenizer, [text for text, _ in marked])}
    by_prefix: dict[Hashable, list[tuple[int, list[int], list[int]]]] = {}
    for member, (prompt, (text, spans)) in enumerate(zip(prompts, marked, strict=True)):
        if not prompt.images:
            continue
        ids, answer = plain_tokens(tokenizer, text, spans, arguments)
        end = 1 + max(place for place, token in enumerate(ids) if token in placeholders)
        # Only branches have logits, but a label right after the prefix is predicted by a row of the prefix.
        if answer and answer[0] > end:
            key = (*map(_image_key, prompt.images), *ids[:end])
            places = [place - end for place in answer]
            by_prefix.setdefault(key, []).append((member, ids[end : answer[-1] + 1], places))
    groups = []
    for members, texts, answers in (zip(*group, strict=True) for group in by_prefix.values()):
        longest = max(range(len(texts)), key=lambda index: len(texts[index]))
        inputs = encode(processor, [prompts[members[longest]]])
        del inputs["labels"]
        ids = inputs["input_ids"][0].tolist()
        prefix = 1 + max(place for place, token in enumerate(ids) if token in placeholders)
        groups.append(GroupPrompts(list(members), inputs, prefix, list(texts), list(answers)))
    return groups


def stack_inputs(inputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack inputs of one row each to those of a batch, padded on the right."""
    length = max(each["input_ids"].shape[1] for each in inputs)
    batch = {}
    for name, first in inputs[0].items():
        values = [each[name] for each in inputs]
        if first.shape == inputs[0]["input_ids"].shape:
            # Padding repeats the last token, which is no placeholder; the mask excludes it.
            edge = "constant" if name == "attention_mask" else "replicate"
            values = [F.pad(value, (0, length - value.shape[1]), mode=edge) for value in values]
        batch[name] = torch.cat(values)
    return batch


def _image_key(image: ImageRef | Image.Image) -> Hashable:
    """Return a key that is equal for the same file, or the same open image."""
    return (str(image.root), image.path) if isinstance(image, ImageRef) else id(image)
