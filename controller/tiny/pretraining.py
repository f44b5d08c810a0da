"""The tiny backbone's recipe: alignment of its image tokens, then language training on packed questions.

In half of the language steps the insert layer is drawn at random, so that the loss rises gradually with it; a
model trained at layer 0 alone is at chance from layer 1 on.
"""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin

from deepinsert.backbones import deep_insert, remove_deep_insert
from deepinsert.backbones.compat.transformers import rename_as_published
from deepinsert.controller.runs.atomic_files import write_json
from deepinsert.controller.runs.folder import start_run, write_result
from deepinsert.controller.runs.machine import machine_facts, package_versions
from deepinsert.envs.data.rendered_text import text_question
from deepinsert.envs.data.rendering import KINDS, Question, draw_scene, questions, render

from .alignment import align, pixels
from .card import write_card
from .figures import TEXT_KINDS, deepest_layers, draw_curves, measure_kinds
from .initial_model import build_model, build_processor
from .muon import make_optimisers, step_optimisers
from .packing import Pack, answer_scores, by_question, make_dialogues, pack

ALL_KINDS = frozenset(kind for kinds in KINDS.values() for kind in kinds)

HISTORY_STEPS = 50
"""Steps per row of the training history, and the fewest steps of a stage."""

FIRST_LEVEL = 2.0
"""Loss in nats from which a stage's running mean starts."""


class Stage(NamedTuple):
    """A stage of the language training."""

    kinds: frozenset[str]
    """Kinds of the questions."""
    enough: float
    """Mean loss at layer 0, in nats, below which the next stage begins."""
    latest: float
    """Share of all steps at which the next stage begins at the latest."""


CURRICULUM = (
    Stage(frozenset({"color", "shape", "word", "digit"}), 0.3, 0.25),
    Stage(ALL_KINDS - {"count", "relation"}, 0.3, 0.45),
    Stage(ALL_KINDS, 0.0, 1.0),
)
"""Stages of the language training: with all kinds at once, the loss stays on a plateau for a long time."""


@dataclass(kw_only=True)
class PretrainTinyOptions:
    """Train the embedded tiny backbone from random weights: data, tokenizer, training, figures, card."""

    out: Path
    """Folder for the checkpoint, its figures and its card."""
    seed: int = 0
    """Seed of every random choice."""
    alignment_steps: int = 1500
    """Batches of the alignment stage."""
    steps: int = 1600
    """Optimiser steps of the language stage."""
    shape_rows: int = 6
    """Images with shapes per step, each with `questions` questions."""
    text_rows: int = 4
    """Images with a word and a digit per step."""
    questions: int = 12
    """Largest number of questions packed on one image."""
    threads: int = 1
    """Threads of the CPU."""
    quick: bool = False
    """Train for seconds instead of an hour, to check that everything works."""


def draw_insert_layer(rng: random.Random, num_layers: int) -> int:
    """Draw layer 0 in half of the steps, else one of 1 to N-1, layer `l` in proportion to (N - l)³.

    Deep layers must be rare: drawn in proportion to N - l, layers up to N-2 become as good as layer 0, and a
    policy has nothing to choose between.
    """
    if rng.random() < 0.5:
        return 0
    layers = range(1, num_layers)
    return rng.choices(layers, [(num_layers - layer) ** 3 for layer in layers])[0]


def draw_packs(
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    kinds: Collection[str],
    options: PretrainTinyOptions,
) -> list[Pack]:
    """Draw the rows of one step: images with shapes, images with text, and questions without an image.

    Args:
        tokenizer: the model's tokenizer.
        rng: the source of all random choices.
        kinds: kinds of the questions about images.
        options: numbers of images and questions.
    """

    def pack_scenes(sources: list[str]) -> Pack:
        scenes = [draw_scene(source, rng, "train") for source in sources]
        questions_per_scene = [questions(scene, rng, kinds)[: options.questions] for scene in scenes]
        dialogues = [make_dialogues(scene_questions, rng) for scene_questions in questions_per_scene]
        return pack(tokenizer, dialogues, pixels([render(scene) for scene in scenes]))

    shape_sources = [("coco", "gqa", "gqa")[row % 3] for row in range(options.shape_rows)]
    text_questions = [Question(*text_question(rng)) for _ in range(8)]
    return [
        pack_scenes(shape_sources),
        pack_scenes(["textvqa"] * options.text_rows),
        pack(tokenizer, [make_dialogues(text_questions, rng)], None),
    ]


def learn_language(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, options: PretrainTinyOptions
) -> list[dict[str, float]]:
    """Train all weights but the vision tower's on language, and return the history, a row per 50 steps."""
    rng = random.Random(f"language {options.seed}")
    model.model.vision_tower.requires_grad_(False)
    optimisers = make_optimisers(model, matrix_lr=0.01, other_lr=3e-3)
    history: list[dict[str, float]] = []
    recent_losses: dict[str, list[float]] = defaultdict(list)
    stage, level, start = 0, FIRST_LEVEL, time.perf_counter()
    for step in range(options.steps):
        is_learned = level < CURRICULUM[stage].enough and step >= HISTORY_STEPS
        if is_learned or step >= CURRICULUM[stage].latest * options.steps:
            stage, level = stage + 1, FIRST_LEVEL
        packs = draw_packs(tokenizer, rng, CURRICULUM[stage].kinds, options)
        weights = [sum(map(len, packed.kinds)) for packed in packs]
        for packed, weight in zip(packs, weights, strict=True):
            layer = draw_insert_layer(rng, len(model.model.language_model.layers))
            losses = by_question(packed, answer_scores(model, packed, layer)[0], "mean")
            torch.autograd.backward(losses.mean() * weight / sum(weights))
            if packed is packs[0] and layer == 0:
                level += 0.1 * (losses.mean().item() - level)
            kinds = [kind for row in packed.kinds for kind in row]
            for kind, loss in zip(kinds, losses.tolist(), strict=True):
                recent_losses[kind if layer == 0 else f"{kind} deep"].append(loss)
        # The learning rates are constant after a warm-up, then fall linearly to 0 over the last third.
        step_optimisers(optimisers, min(1.0, (step + 1) / 30, 3 * (1 - step / options.steps)))
        if (step + 1) % HISTORY_STEPS == 0 or step + 1 == options.steps:
            means = {
                kind: round(sum(losses) / len(losses), 4) for kind, losses in sorted(recent_losses.items())
            }
            seconds = round(time.perf_counter() - start)
            history.append({"step": step + 1, "stage": stage, "seconds": seconds, **means})
            print(history[-1], flush=True)
            recent_losses.clear()
            model.save_pretrained(options.out / "model")
    model.requires_grad_(True)
    return history


def aligned_model(
    tokenizer: PreTrainedTokenizerFast, options: PretrainTinyOptions
) -> tuple[LlavaForConditionalGeneration, dict[str, Any]]:
    """Return the model after alignment, from `out/aligned` if an earlier run finished that stage."""
    folder, report = options.out / "aligned", options.out / "aligned.json"
    if not report.exists():
        start = time.perf_counter()
        model = build_model(tokenizer, options.seed)
        accuracy = align(model, tokenizer, options.alignment_steps, options.seed)
        model.save_pretrained(folder)
        write_json(report, {"accuracy": accuracy, "seconds": round(time.perf_counter() - start)})
    return LlavaForConditionalGeneration.from_pretrained(folder), json.loads(report.read_text())


def save_checkpoint(model: Any, processor: ProcessorMixin, folder: Path) -> None:
    """Save model and processor in the published format, with the names of weights that all versions read."""
    model.save_pretrained(folder)
    weights = rename_as_published(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    processor.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)


def run(options: PretrainTinyOptions) -> dict[str, Any]:
    """Run the whole recipe and return `result.json`; `out/model` then holds the files of `backbones/tiny`.

    A second run continues after the alignment stage if that has finished, else from the beginning.
    """
    if options.quick:
        options = replace(options, alignment_steps=3, steps=4, shape_rows=2, text_rows=1)
    out, folder = start_run(options), options.out / "model"
    torch.set_num_threads(options.threads)
    processor = build_processor(options.seed)
    tokenizer = processor.tokenizer
    model, alignment = aligned_model(tokenizer, options)
    model = deep_insert(model, 0)
    start = time.perf_counter()
    history = learn_language(model, tokenizer, options)
    seconds = round(time.perf_counter() - start)
    images = 12 if options.quick else 600
    layers = range(len(model.model.language_model.layers) + 1)
    figures = measure_kinds(model, tokenizer, images, layers)
    blank = measure_kinds(model, tokenizer, images, [0], blank=True)["accuracy"]
    save_checkpoint(remove_deep_insert(model), processor, folder)
    result = {
        **figures,
        "blank_accuracy": {kind: values[0] for kind, values in blank.items() if kind not in TEXT_KINDS},
        "deepest_layer": deepest_layers(figures["accuracy"]),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "alignment_accuracy": alignment["accuracy"],
        "seconds": {"alignment": alignment["seconds"], "language": seconds},
        "options": {name: value for name, value in asdict(options).items() if name != "out"},
        "machine": machine_facts(),
        "versions": package_versions(),
        "history": history,
    }
    write_json(folder / "figures.json", result)
    draw_curves(result, folder / "curves.png")
    write_card(result, folder / "README.md")
    return write_result(out, result)
