"""First stage of the tiny backbone's training: image tokens learn to name the content of their patches.

A vision tower with random weights learns very slowly through a language model. Here each of the 64 projected
features is trained towards the words that describe its patch, in the space of the language model's input
embeddings, as LLaVA's first stage aligns the projector.
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
from .muon import make_optimisers, step_optimisers, warm_up_and_decay

GROUPS: dict[str, tuple[str, ...]] = {
    "what": ("empty", *SHAPES, *WORDS, *"0123456789"),
    "colour": tuple(COLOURS),
    "size": ("small", "large"),
    "row": ("top", "bottom"),
    "column": ("left", "right"),
}
"""Words that describe a patch, one per group; colour and size apply only to occupied patches."""

SHARPNESS = 20.0
"""Factor on the cosine between a feature and a word's embedding before the softmax."""


def pixels(images: list[Image.Image]) -> Tensor:
    """Return the processor's output for 64 x 64 images: (count, 3, 64, 64) in [-1, 1]."""
    stacked = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def describe_patches(scene: Scene) -> np.ndarray:
    """Return the index of each patch's word in each group, (5, 64); -100 if the group does not apply."""
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
    """Return the token ids of each group's words, as inside a sentence.

    Raises `ValueError` if the tokenizer splits a word into several tokens.
    """
    ids = {word: tokenizer.encode(f" {word}") for group in GROUPS.values() for word in group}
    split_words = [word for word, tokens in ids.items() if len(tokens) > 1]
    if split_words:
        raise ValueError(f"the tokenizer splits {split_words}: the alignment stage needs one token per word")
    return [[ids[word][0] for word in group] for group in GROUPS.values()]


def alignment_logits(
    model: LlavaForConditionalGeneration, images: Tensor, groups: list[list[int]]
) -> list[Tensor]:
    """Return the logits of each group's words for every image token, (count, 64, words) per group."""
    features = torch.stack(model.get_image_features(images, return_dict=True).pooler_output)
    features = F.normalize(features, dim=-1)
    embeddings = model.get_input_embeddings()
    return [SHARPNESS * features @ F.normalize(embeddings(torch.tensor(ids)), dim=-1).T for ids in groups]


def alignment_loss(logits: list[Tensor], labels: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats over the groups; `labels` are (count, 5, 64).

    Empty patches, the great majority, weigh as much as all others together.
    """
    losses = [
        F.cross_entropy(score.flatten(0, 1), labels[:, group].flatten(), reduction="none", ignore_index=-100)
        for group, score in enumerate(logits)
    ]
    occupied = labels[:, 1].flatten() >= 0
    what = (losses[0][occupied].mean() + losses[0][~occupied].mean()) / 2
    rest = [losses[1][occupied].mean(), losses[2][occupied].mean(), losses[3].mean(), losses[4].mean()]
    return (2 * what + torch.stack(rest).sum()) / 6


def draw_batch(rng: random.Random, count: int, side: Side = "train") -> tuple[list[Scene], Tensor]:
    """Draw scenes of all sources and their pixels; half have text, which takes longest to learn."""
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
    """Train vision tower and projector, and return the accuracy on held-out images by kind.

    Args:
        model: the model to train in place.
        tokenizer: the model's tokenizer.
        steps: the number of batches.
        seed: the seed of the scenes.
        batch_size: images per batch.
        report: is called with a line on the loss every 100 steps.
    """
    rng = random.Random(f"alignment {seed}")
    groups = word_ids(tokenizer)
    model.requires_grad_(False)
    model.model.vision_tower.requires_grad_(True)
    model.model.multi_modal_projector.requires_grad_(True)
    optimisers = make_optimisers(model, matrix_lr=0.02, other_lr=2e-3)
    for step in range(steps):
        scenes, images = draw_batch(rng, batch_size)
        labels = torch.from_numpy(np.stack([describe_patches(scene) for scene in scenes]))
        loss = alignment_loss(alignment_logits(model, images, groups), labels)
        torch.autograd.backward(loss)
        step_optimisers(optimisers, warm_up_and_decay(step, steps))
        if (step + 1) % 100 == 0:
            report(f"alignment step {step + 1}: loss {loss.item():.3f}")
    model.requires_grad_(True)
    return alignment_accuracy(model, tokenizer)


@torch.no_grad()
def alignment_accuracy(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, images: int = 200
) -> dict[str, float]:
    """Return the accuracy on patches of held-out images by kind: shape, colour, size, word, digit."""
    groups = word_ids(tokenizer)
    scenes, batch = draw_batch(random.Random("alignment held out"), images, "held_out")
    labels = torch.from_numpy(np.stack([describe_patches(scene) for scene in scenes]))
    logits = alignment_logits(model, batch, groups)
    is_correct = [scores.argmax(-1) == labels[:, group] for group, scores in enumerate(logits)]
    what, occupied = labels[:, 0], labels[:, 1] >= 0
    first_word, first_digit = 1 + len(SHAPES), 1 + len(SHAPES) + len(WORDS)
    patches_of = {
        "shape": (0, occupied & (what < first_word)),
        "word": (0, (what >= first_word) & (what < first_digit)),
        "digit": (0, what >= first_digit),
        "colour": (1, occupied),
        "size": (2, occupied),
    }
    return {
        kind: is_correct[group][patches].float().mean().item()
        for kind, (group, patches) in patches_of.items()
    }
