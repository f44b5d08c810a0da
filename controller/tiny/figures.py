"""Figures of the tiny backbone: loss and accuracy by kind and insert layer, with their picture.

They are measured on pictures and handwritten digits that are not in the training data.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from deepinsert.controller.runs.atomic_files import save_figure
from deepinsert.envs.data.rendered_text import text_question
from deepinsert.envs.data.rendering import KINDS, Question, Scene, Side, draw_scene, questions, render

from .alignment import pixels
from .packing import Pack, answer_scores, by_question, pack

TEXT_KINDS = ("sum", "opposite", "thing")
"""Kinds of questions without an image."""

SCENES_PER_PACK = 12


@torch.no_grad()
def measure_kinds(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    images: int,
    layers: Collection[int],
    *,
    blank: bool = False,
    side: Side = "held_out",
    seed: int = 0,
) -> dict[str, Any]:
    """Measure loss and accuracy of each kind of question at each insert layer.

    An answer is correct if each of its tokens and its end is the likeliest one, so that greedy decoding
    generates exactly this answer.

    Args:
        model: the model to measure.
        tokenizer: its tokenizer.
        images: the number of images to draw.
        layers: the insert layers.
        blank: replace every image by a grey one.
        side: the side of the split to draw images from.
        seed: the seed of the images and questions.

    Returns:
        `loss` (nats) and `accuracy`, each a list by layer per kind, and `questions`, their number per kind.
    """
    rng = random.Random(f"judge {seed}")
    sources = tuple(KINDS)
    scenes = [draw_scene(sources[i % len(sources)], rng, side) for i in range(images)]
    packs = [
        _held_out_pack(tokenizer, scenes[start : start + SCENES_PER_PACK], rng, blank)
        for start in range(0, images, SCENES_PER_PACK)
    ]
    text_dialogues = [[[Question(*text_question(rng))] for _ in range(min(images, 60))]]
    packs.append(pack(tokenizer, text_dialogues, None))
    loss: dict[str, list[float]] = defaultdict(list)
    accuracy: dict[str, list[float]] = defaultdict(list)
    count: dict[str, int] = {}
    for layer in layers:
        for kind, scores in sorted(_scores_by_kind(model, packs, layer).items()):
            loss[kind].append(round(sum(score[0] for score in scores) / len(scores), 4))
            accuracy[kind].append(round(sum(score[1] for score in scores) / len(scores), 4))
            count[kind] = len(scores)
    return {"loss": dict(loss), "accuracy": dict(accuracy), "questions": count}


def _scores_by_kind(
    model: LlavaForConditionalGeneration, packs: Sequence[Pack], layer: int
) -> dict[str, list[tuple[float, float]]]:
    """Return (loss in nats, 1 if correct else 0) of each question at an insert layer, by kind."""
    scores: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for packed in packs:
        losses, is_likeliest = answer_scores(model, packed, layer)
        means = by_question(packed, losses, "mean").tolist()
        correct = by_question(packed, is_likeliest.float(), "amin").tolist()
        kinds = [kind for row in packed.kinds for kind in row]
        for kind, mean, is_correct in zip(kinds, means, correct, strict=True):
            scores[kind].append((mean, is_correct))
    return scores


def _held_out_pack(
    tokenizer: PreTrainedTokenizerFast, scenes: list[Scene], rng: random.Random, blank: bool
) -> Pack:
    """Pack each scene with the questions of its own source, one question per branch."""
    dialogues = [[[question] for question in questions(scene, rng)] for scene in scenes]
    images = pixels([render(scene) for scene in scenes])
    return pack(tokenizer, dialogues, torch.zeros_like(images) if blank else images)


def deepest_layers(accuracy: dict[str, list[float]], tolerance: float = 0.05) -> dict[str, int]:
    """Return, per kind, the last insert layer up to which accuracy stays within `tolerance` of layer 0."""
    deepest = {}
    for kind, values in accuracy.items():
        lossy_layers = [layer for layer, value in enumerate(values) if value < values[0] - tolerance]
        deepest[kind] = (lossy_layers[0] if lossy_layers else len(values)) - 1
    return deepest


def draw_curves(figures: dict[str, Any], path: Path) -> Path:
    """Draw loss and accuracy by insert layer, one line per kind of question; layer N is without the image."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        kinds = sorted(figures[name], key=lambda kind: (kind in TEXT_KINDS, kind))
        for number, kind in enumerate(kinds):
            style = {"color": "0.6", "linestyle": ":"} if kind in TEXT_KINDS else {"color": f"C{number}"}
            axes.plot(figures[name][kind], marker=".", label=kind, **style)
        axes.set(xlabel="insert layer", ylabel=name + (" (nats)" if name == "loss" else ""))
        axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle("The tiny backbone on held-out images, by kind of question (dotted: without an image)")
    return save_figure(figure, path)
