"""What tells prompts apart by their content, and which of them are computed together.

A group is all prompts about some images, so that what an image costs is paid once and images that are alike
run as one batch. It is the unit in which a reward table is computed: its bits depend on the group alone, not
on what else is in the table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deepinsert.envs.prompts import EncodedImage, ImageRef, Prompt

LEAST_GROUP = 32
"""Prompts of a group, at least, but for the last one; an image's are never divided."""

ENDS = 4096
"""Bytes read at the start and the end of an image file to tell it from others."""

IntArray = NDArray[np.int64]


def prompt_keys(prompts: Sequence[Prompt]) -> list[str]:
    """16 hex digits of each prompt's content (P): messages, images, answer and where the loss is taken.

    Ids, sources and paths do not enter, so the same question keeps its key in another data set.
    """
    known: dict[ImageRef, list[Any]] = {}
    keys = []
    for prompt in prompts:
        images = [_image_identity(image, known) for image in prompt.images]
        keys.append(digest([images, prompt.messages, prompt.answer, prompt.loss_on]))
    return keys


def prompt_groups(prompts: Sequence[Prompt]) -> list[IntArray]:
    """Indices of the prompts of each group: those of some images, in order of first appearance.

    Prompts without an image are taken one by one, as if each were about one of its own.
    """
    images: dict[Any, list[int]] = {}
    for index, prompt in enumerate(prompts):
        images.setdefault(prompt.image_key if prompt.images else index, []).append(index)
    groups: list[list[int]] = []
    for indices in images.values():
        if not groups or len(groups[-1]) >= LEAST_GROUP:
            groups.append([])
        groups[-1] += indices
    return [np.array(indices, dtype=np.int64) for indices in groups]


def distinct(keys: Sequence[str]) -> tuple[IntArray, IntArray]:
    """Where each different key first stands, and for each key the position among those; in their order."""
    order: dict[str, int] = {}
    position = np.array([order.setdefault(key, len(order)) for key in keys], dtype=np.int64)
    _, first = np.unique(position, return_index=True)
    return first.astype(np.int64), position


def group_key(keys: Sequence[str], batch_tokens: int) -> str:
    """16 hex digits of what, beside the model, the bits of a group's losses depend on."""
    return digest([batch_tokens, list(dict.fromkeys(keys))])


def shards_of(groups: Sequence[IntArray], prompts: int) -> list[list[int]]:
    """Runs of consecutive groups that hold about `prompts` prompts each, as indices of the groups."""
    shards: list[list[int]] = []
    filled = prompts
    for index, group in enumerate(groups):
        if filled >= prompts:
            shards.append([])
            filled = 0
        shards[-1].append(index)
        filled += len(group)
    return shards


def digest(content: Any) -> str:
    """16 hex digits over JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _image_identity(image: ImageRef | Image.Image, known: dict[ImageRef, list[Any]]) -> list[Any]:
    """Tells images apart without decoding a file: its size and both ends, or the pixels of an open image."""
    if not isinstance(image, ImageRef):
        return [*image.size, image.mode, hashlib.sha256(image.tobytes()).hexdigest()]
    if isinstance(image, EncodedImage):
        return [len(image.data), hashlib.sha256(image.data).hexdigest()]
    if image not in known:
        path = image.root / image.path
        size = path.stat().st_size
        with open(path, "rb") as file:
            ends = file.read(ENDS)
            file.seek(max(size - ENDS, 0))
            ends += file.read(ENDS)
        known[image] = [size, hashlib.sha256(ends).hexdigest()]
    return known[image]
