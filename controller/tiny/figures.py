"""Figures of the tiny backbone: loss and accuracy by kind and insert layer, with their picture.

Judged on pictures and handwritten digits that the training never draws.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection
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


@torch.no_grad()
def judge(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    images: int,
    layers: Collection[int],
    *,
    blank: bool = False,
    side: Side = "held_out",
    seed: int = 0,
) -> dict[str, Any]:
    """Loss (nats) and accuracy: `{"loss": {kind: [by layer]}, "accuracy": the same, "questions": {kind: n}}`.

    Right means that every token of the answer and its end is the likeliest one: greedy decoding then gives
    exactly this answer. `blank` puts a grey image in every image's place.
    """
    rng = random.Random(f"judge {seed}")
    sources = tuple(KINDS)
    scenes = [draw_scene(sources[i % len(sources)], rng, side) for i in range(images)]
    packs = [_held_out_pack(tokenizer, scenes[i : i + 12], rng, blank) for i in range(0, images, 12)]
    texts = [[[Question(*text_question(rng))] for _ in range(min(images, 60))]]
    packs.append(pack(tokenizer, texts, None))
    loss: dict[str, list[float]] = defaultdict(list)
    accuracy: dict[str, list[float]] = defaultdict(list)
    count: dict[str, int] = {}
    for layer in layers:
        found: dict[str, list[tuple[float, bool]]] = defaultdict(list)
        for packed in packs:
            losses, right = answer_scores(model, packed, layer)
            means = by_question(packed, losses, "mean").tolist()
            exact = by_question(packed, right.float(), "amin").tolist()
            names = [kind for row in packed.kinds for kind in row]
            for name, *values in zip(names, means, exact, strict=True):
                found[name].append(tuple(values))
        for kind, pairs in sorted(found.items()):
            loss[kind].append(round(sum(p[0] for p in pairs) / len(pairs), 4))
            accuracy[kind].append(round(sum(p[1] for p in pairs) / len(pairs), 4))
            count[kind] = len(pairs)
    return {"loss": dict(loss), "accuracy": dict(accuracy), "questions": count}


def _held_out_pack(
    tokenizer: PreTrainedTokenizerFast, scenes: list[Scene], rng: random.Random, blank: bool
) -> Pack:
    """Each scene with the questions of its own source, one turn each."""
    asked = [[[question] for question in questions(scene, rng)] for scene in scenes]
    images = pixels([render(scene) for scene in scenes])
    return pack(tokenizer, asked, torch.zeros_like(images) if blank else images)


def deepest_layers(accuracy: dict[str, list[float]], within: float = 0.05) -> dict[str, int]:
    """For each kind, the deepest insert layer up to which none loses more than `within` against layer 0."""
    deepest = {}
    for kind, values in accuracy.items():
        bad = [layer for layer, value in enumerate(values) if value < values[0] - within]
        deepest[kind] = (bad[0] if bad else len(values)) - 1
    return deepest


def draw_curves(figures: dict[str, Any], path: Path) -> Path:
    """Loss and accuracy by insert layer, a line for each kind of question; layer N is without the image."""
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
