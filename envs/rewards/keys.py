"""Keys of prompts' contents, and the groups of prompts that are computed together.

A group consists of all prompts about some images, so that each image is encoded once and images of the same
size run as one batch. It is the unit in which a reward table is computed: the bits of a loss depend only on
the group, not on other prompts of the table.
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

MIN_GROUP_PROMPTS = 32
"""A group has at least this many prompts, except the last one; an image's prompts stay together."""

ENDS = 4096
"""Bytes at the start and at the end of an image file that identify it."""

IntArray = NDArray[np.int64]


def prompt_keys(prompts: Sequence[Prompt]) -> list[str]:
    """Return 16 hex digits of each prompt's content (P): messages, images, answer and labelled turns.

    Ids, sources and paths are not part of it, so the same question has the same key in another data set.
    """
    identities: dict[ImageRef, list[Any]] = {}
    keys = []
    for prompt in prompts:
        images = [_image_identity(image, identities) for image in prompt.images]
        keys.append(digest([images, prompt.messages, prompt.answer, prompt.loss_on]))
    return keys


def prompt_groups(prompts: Sequence[Prompt]) -> list[IntArray]:
    """Return the indices of each group's prompts, images in the order of their first appearance.

    A prompt without an image counts as a prompt about an image of its own.
    """
    images: dict[Any, list[int]] = {}
    for index, prompt in enumerate(prompts):
        images.setdefault(prompt.image_key if prompt.images else index, []).append(index)
    groups: list[list[int]] = []
    for indices in images.values():
        if not groups or len(groups[-1]) >= MIN_GROUP_PROMPTS:
            groups.append([])
        groups[-1] += indices
    return [np.array(indices, dtype=np.int64) for indices in groups]


def distinct(keys: Sequence[str]) -> tuple[IntArray, IntArray]:
    """Return the index of each distinct key's first occurrence, and for each key its rank among these."""
    order: dict[str, int] = {}
    position = np.array([order.setdefault(key, len(order)) for key in keys], dtype=np.int64)
    _, first = np.unique(position, return_index=True)
    return first.astype(np.int64), position


def group_key(keys: Sequence[str], batch_tokens: int) -> str:
    """Return 16 hex digits of everything but the model that the bits of a group's losses depend on."""
    return digest([batch_tokens, list(dict.fromkeys(keys))])


def shards_of(groups: Sequence[IntArray], prompts: int) -> list[list[int]]:
    """Divide the groups into runs of about `prompts` prompts; return the indices of each run's groups."""
    shards: list[list[int]] = []
    shard_prompts = prompts
    for index, group in enumerate(groups):
        if shard_prompts >= prompts:
            shards.append([])
            shard_prompts = 0
        shards[-1].append(index)
        shard_prompts += len(group)
    return shards


def digest(content: Any) -> str:
    """Return 16 hex digits of JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _image_identity(image: ImageRef | Image.Image, identities: dict[ImageRef, list[Any]]) -> list[Any]:
    """Identify an image without decoding it: by a file's size and both ends, or by an open image's pixels."""
    if not isinstance(image, ImageRef):
        return [*image.size, image.mode, hashlib.sha256(image.tobytes()).hexdigest()]
    if isinstance(image, EncodedImage):
        return [len(image.data), hashlib.sha256(image.data).hexdigest()]
    if image not in identities:
        path = image.root / image.path
        size = path.stat().st_size
        with open(path, "rb") as file:
            ends = file.read(ENDS)
            file.seek(max(size - ENDS, 0))
            ends += file.read(ENDS)
        identities[image] = [size, hashlib.sha256(ends).hexdigest()]
    return identities[image]
