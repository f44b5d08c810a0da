"""Prompts about the same images, each tokenised, with the images processed once."""

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
    """P prompts with the same tokens and images up to the last multimodal token, the `prefix`.

    `members` are their places among the prompts given. `inputs` are the model's for the longest of them (B =
    1, no labels) and `prefix` counts its tokens. `texts[p]` are the token ids that follow it, up to the last
    that carries loss, and `answers[p]` the places among them of those that do, ascending.
    """

    members: list[int]
    inputs: dict[str, Tensor]
    prefix: int
    texts: list[list[int]]
    answers: list[list[int]]

    @property
    def layout(self) -> Hashable:
        """Equal for groups that can be rows of one batch: alike but for the values of their features."""
        shapes = tuple(
            (name, *value.shape[1:]) for name, value in self.inputs.items() if value.is_floating_point()
        )
        return (*self.inputs["input_ids"][0, : self.prefix].tolist(), shapes)


def group_prompts(processor: ProcessorMixin, prompts: Sequence[Prompt]) -> list[GroupPrompts]:
    """The prompts that begin with images in groups that begin alike, in the order of their first members.

    In none are those without an image, and those with loss on an answer before the last image.
    """
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    placeholders = placeholder_ids_of(processor, tokenizer)
    marked = chat_texts(processor, prompts)
    arguments = {"add_special_tokens": not writes_bos(tokenizer, [text for text, _ in marked])}
    alike: dict[tuple, list[tuple[int, list[int], list[int]]]] = {}
    for member, (prompt, (text, spans)) in enumerate(zip(prompts, marked, strict=True)):
        if not prompt.images:
            continue
        ids, answer = plain_tokens(tokenizer, text, spans, arguments)
        end = 1 + max(place for place, token in enumerate(ids) if token in placeholders)
        if answer and answer[0] > end:  # the first token after the prefix is predicted by a row of the prefix
            key = (*map(_image_key, prompt.images), *ids[:end])
            places = [place - end for place in answer]
            alike.setdefault(key, []).append((member, ids[end : answer[-1] + 1], places))
    groups = []
    for members, texts, answers in (zip(*group, strict=True) for group in alike.values()):
        longest = max(range(len(texts)), key=lambda index: len(texts[index]))
        inputs = encode(processor, [prompts[members[longest]]])
        del inputs["labels"]
        ids = inputs["input_ids"][0].tolist()
        prefix = 1 + max(place for place, token in enumerate(ids) if token in placeholders)
        groups.append(GroupPrompts(list(members), inputs, prefix, list(texts), list(answers)))
    return groups


def stacked(inputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Inputs of one row each as those of a batch; rows are padded on the right."""
    most = max(each["input_ids"].shape[1] for each in inputs)
    batch = {}
    for name, first in inputs[0].items():
        values = [each[name] for each in inputs]
        if first.shape == inputs[0]["input_ids"].shape:
            # The last token again, which is no placeholder; the mask tells padding apart.
            edge = "constant" if name == "attention_mask" else "replicate"
            values = [F.pad(value, (0, most - value.shape[1]), mode=edge) for value in values]
        batch[name] = torch.cat(values)
    return batch


def _image_key(image: ImageRef | Image.Image) -> Hashable:
    """Equal for the same file, or the same open image."""
    return (str(image.root), image.path) if isinstance(image, ImageRef) else id(image)
