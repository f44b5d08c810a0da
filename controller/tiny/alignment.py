"""First stage of the tiny backbone's training: its image tokens learn to name what they lie on.

A vision tower from nothing learns very slowly through a language model. Here each of the 64 projected
features is told which words describe its patch, in the space of the language model's own input embeddings,
as LLaVA's first stage aligns the projector.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from deepinsert.envs.data.rendering import (
    COLOURS,
    SHAPES,
    SIZE,
    SOURCES,
    WORDS,
    Scene,
    Side,
    draw_scene,
    render,
)

from .initial_model import IMAGE_TOKENS, PATCH
from .muon import optimisers, update, warm_up_and_down

GROUPS: dict[str, tuple[str, ...]] = {
    "what": ("empty", *SHAPES, *WORDS, *"0123456789"),
    "colour": tuple(COLOURS),
    "size": ("small", "large"),
    "row": ("top", "bottom"),
    "column": ("left", "right"),
}
"""A patch is described by one word of each group; colour and size only where something lies."""

SHARPNESS = 20.0
"""Factor on the cosine between a feature and a word's embedding before the softmax."""


def pixels(images: list[Image.Image]) -> Tensor:
    """What the processor makes of 64 x 64 images: (count, 3, 64, 64) in [-1, 1]."""
    stacked = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def describe_patches(scene: Scene) -> np.ndarray:
    """Index of each patch's word in each group, (5, 64); -100 where the group does not apply."""
    grid = SIZE // PATCH
    centre = (np.arange(grid) + 0.5) * PATCH
    x, y = np.tile(centre, grid), np.repeat(centre, grid)
    labels = np.full((len(GROUPS), IMAGE_TOKENS), -100)
    labels[0] = 0
    labels[3], labels[4] = y >= SIZE / 2, x >= SIZE / 2
    for item in scene.items:
        left, top, right, bottom = item.box
        inside = (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
        labels[0, inside] = GROUPS["what"].index(item.what)
        labels[1, inside] = GROUPS["colour"].index(item.colour)
        labels[2, inside] = GROUPS["size"].index(item.size)
    return labels


def word_ids(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of each group's words (as they stand inside a sentence); each word must be one token."""
    ids = [[tokenizer.encode(f" {word}") for word in group] for group in GROUPS.values()]
    split = [
        w
        for g, group in zip(ids, GROUPS.values(), strict=True)
        for i, w in zip(g, group, strict=True)
        if len(i) > 1
    ]
    if split:
        raise ValueError(f"the tokenizer splits {split}: the alignment stage needs one token for each word")
    return [[word[0] for word in group] for group in ids]


def alignment_logits(
    model: LlavaForConditionalGeneration, images: Tensor, groups: list[list[int]]
) -> list[Tensor]:
    """Scores (count, 64, words) of each group's words for every image token."""
    features = torch.stack(model.get_image_features(images, return_dict=True).pooler_output)
    features = F.normalize(features, dim=-1)
    embed = model.get_input_embeddings()
    return [SHARPNESS * features @ F.normalize(embed(torch.tensor(ids)), dim=-1).T for ids in groups]


def alignment_loss(logits: list[Tensor], labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the groups; `labels` (count, 5, 64). Empty patches, the great
    majority, weigh as much as all others together."""
    losses = [
        F.cross_entropy(score.flatten(0, 1), labels[:, group].flatten(), reduction="none", ignore_index=-100)
        for group, score in enumerate(logits)
    ]
    occupied = labels[:, 1].flatten() >= 0
    what = (losses[0][occupied].mean() + losses[0][~occupied].mean()) / 2
    rest = [losses[1][occupied].mean(), losses[2][occupied].mean(), losses[3].mean(), losses[4].mean()]
    return (2 * what + torch.stack(rest).sum()) / 6


def draw_batch(rng: random.Random, count: int, side: Side = "train") -> tuple[list[Scene], Tensor]:
    """Scenes of all sources, half of them with text, which takes longest to learn; and their pixels."""
    sources = (*SOURCES, "textvqa")
    scenes = [draw_scene(sources[i % len(sources)], rng, side) for i in range(count)]
    return scenes, pixels([render(scene) for scene in scenes])


def align(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    seed: int = 0,
    batch_size: int = 32,
    report: Callable[[str], None] = print,
) -> dict[str, float]:
    """Train vision tower and projector, `steps` batches; returns the accuracy on held-out images by kind."""
    rng = random.Random(f"alignment {seed}")
    groups = word_ids(tokenizer)
    model.requires_grad_(False)
    model.model.vision_tower.requires_grad_(True)
    model.model.multi_modal_projector.requires_grad_(True)
    pair = optimisers(model, matrix_lr=0.02, other_lr=2e-3)
    for step in range(steps):
        scenes, images = draw_batch(rng, batch_size)
        labels = torch.from_numpy(np.stack([describe_patches(scene) for scene in scenes]))
        loss = alignment_loss(alignment_logits(model, images, groups), labels)
        loss.backward()
        update(pair, warm_up_and_down(step, steps))
        if (step + 1) % 100 == 0:
            report(f"alignment step {step + 1}: loss {loss.item():.3f}")
    model.requires_grad_(True)
    return alignment_accuracy(model, tokenizer)


@torch.no_grad()
def alignment_accuracy(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, images: int = 200
) -> dict[str, float]:
    """Share of occupied patches of held-out images named rightly: shape, colour, size, word, digit."""
    groups = word_ids(tokenizer)
    scenes, batch = draw_batch(random.Random("alignment held out"), images, "held_out")
    labels = torch.from_numpy(np.stack([describe_patches(scene) for scene in scenes]))
    right = [
        score.argmax(-1) == labels[:, g] for g, score in enumerate(alignment_logits(model, batch, groups))
    ]
    what, occupied = labels[:, 0], labels[:, 1] >= 0
    first_word, first_digit = 1 + len(SHAPES), 1 + len(SHAPES) + len(WORDS)
    chosen = {
        "shape": (0, occupied & (what < first_word)),
        "word": (0, (what >= first_word) & (what < first_digit)),
        "digit": (0, what >= first_digit),
        "colour": (1, occupied),
        "size": (2, occupied),
    }
    return {kind: right[group][where].float().mean().item() for kind, (group, where) in chosen.items()}
