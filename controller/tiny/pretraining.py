"""The tiny backbone's recipe: alignment of its image tokens, then language training on packed questions.

In half of the language steps the insert layer is drawn at random, so that the loss depends on it by degrees;
a model trained at layer 0 alone is blind from layer 1 on.
"""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from deepinsert.backbones import deep_insert, remove_deep_insert
from deepinsert.backbones.compat.transformers import rename_as_published
from deepinsert.controller.runs.atomic_files import write_json
from deepinsert.controller.runs.folder import start_run, write_result
from deepinsert.controller.runs.machine import machine_facts, package_versions
from deepinsert.envs.data.rendered_text import text_question
from deepinsert.envs.data.rendering import KINDS, Question, draw_scene, questions, render

from .alignment import align, pixels
from .card import write_card
from .figures import TEXT_KINDS, deepest_layers, draw_curves, judge
from .initial_model import build_model, build_processor
from .muon import optimisers, update
from .packing import Pack, answer_scores, by_question, dialogues, pack

ALL_KINDS = frozenset(kind for kinds in KINDS.values() for kind in kinds)
CURRICULUM: tuple[tuple[frozenset[str], float, float], ...] = (
    (frozenset({"color", "shape", "word", "digit"}), 0.3, 0.25),
    (ALL_KINDS - {"count", "relation"}, 0.3, 0.45),
    (ALL_KINDS, 0.0, 1.0),
)
"""Kinds asked; the loss at layer 0, in nats, at which the next stage begins; the share of the steps at which
it begins at the latest. All kinds at once stay on a plateau for a long time."""


@dataclass(kw_only=True)
class PretrainTinyOptions:
    """Make the embedded tiny backbone from nothing: data, tokenizer, training, figures, card."""

    out: Path
    """Folder for the checkpoint, its figures and its card."""
    seed: int = 0
    """Seed of every random choice."""
    alignment_steps: int = 1500
    """Batches of the alignment stage."""
    steps: int = 1600
    """Optimiser steps of the language stage."""
    shape_rows: int = 6
    """Images with shapes in a step, each with `questions` questions."""
    text_rows: int = 4
    """Images with a word and a digit in a step."""
    questions: int = 12
    """Most questions packed on one image."""
    threads: int = 1
    """Threads of the CPU."""
    quick: bool = False
    """Seconds instead of an hour: to see that everything works."""


def draw_insert_layer(rng: random.Random, num_layers: int) -> int:
    """0 in half of the steps, else 1 to N-1, layer `l` in proportion to (N - l)³.

    The deeper, the rarer by far: drawn in proportion to N - l, layers up to N-2 end up as good as layer 0,
    and nothing is left to choose between.
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
    """One step's rows: images with shapes, images with text, questions without an image."""

    def rows(sources: list[str]) -> Pack:
        scenes = [draw_scene(source, rng, "train") for source in sources]
        asked = [questions(scene, rng, kinds)[: options.questions] for scene in scenes]
        return pack(tokenizer, [dialogues(a, rng) for a in asked], pixels([render(s) for s in scenes]))

    shapes = [("coco", "gqa", "gqa")[i % 3] for i in range(options.shape_rows)]
    text = [Question(*text_question(rng)) for _ in range(8)]
    return [
        rows(shapes),
        rows(["textvqa"] * options.text_rows),
        pack(tokenizer, [dialogues(text, rng)], None),
    ]


def learn_language(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, options: PretrainTinyOptions
) -> list[dict[str, float]]:
    """The language stage, all weights but the vision tower's. Returns the history, a row each 50 steps."""
    rng = random.Random(f"language {options.seed}")
    model.model.vision_tower.requires_grad_(False)
    pair = optimisers(model, matrix_lr=0.01, other_lr=3e-3)
    history: list[dict[str, float]] = []
    recent: dict[str, list[float]] = defaultdict(list)
    stage, level, start = 0, 2.0, time.perf_counter()
    for step in range(options.steps):
        kinds, enough, latest = CURRICULUM[stage]
        if (level < enough and step >= 50) or step >= latest * options.steps:
            stage, level = stage + 1, 2.0
            kinds = CURRICULUM[stage][0]
        packs = draw_packs(tokenizer, rng, kinds, options)
        weights = [sum(map(len, p.kinds)) for p in packs]
        for packed, weight in zip(packs, weights, strict=True):
            layer = draw_insert_layer(rng, len(model.model.language_model.layers))
            losses = by_question(packed, answer_scores(model, packed, layer)[0], "mean")
            (losses.mean() * weight / sum(weights)).backward()
            if packed is packs[0] and layer == 0:
                level += 0.1 * (losses.mean().item() - level)
            names = [kind for row in packed.kinds for kind in row]
            for kind, loss in zip(names, losses.tolist(), strict=True):
                recent[kind if layer == 0 else f"{kind} deep"].append(loss)
        # Full speed, then straight down to nothing over the last third.
        update(pair, min(1.0, (step + 1) / 30, 3 * (1 - step / options.steps)))
        if (step + 1) % 50 == 0 or step + 1 == options.steps:
            row = {kind: round(sum(x) / len(x), 4) for kind, x in sorted(recent.items())}
            history.append(
                {"step": step + 1, "stage": stage, "seconds": round(time.perf_counter() - start), **row}
            )
            print(history[-1], flush=True)
            recent.clear()
            model.save_pretrained(options.out / "model")
    model.requires_grad_(True)
    return history


def aligned_model(
    tokenizer: PreTrainedTokenizerFast, options: PretrainTinyOptions
) -> tuple[LlavaForConditionalGeneration, dict[str, Any]]:
    """The model after its first stage, from `out/aligned` where an earlier run finished that stage."""
    folder, report = options.out / "aligned", options.out / "aligned.json"
    if not report.exists():
        start = time.perf_counter()
        model = build_model(tokenizer, options.seed)
        accuracy = align(model, tokenizer, options.alignment_steps, options.seed)
        model.save_pretrained(folder)
        write_json(report, {"accuracy": accuracy, "seconds": round(time.perf_counter() - start)})
    return LlavaForConditionalGeneration.from_pretrained(folder), json.loads(report.read_text())


def run(options: PretrainTinyOptions) -> dict[str, Any]:
    """The whole recipe; `out/model` then holds what `backbones/tiny` ships. Returns `result.json`.

    Running it again continues after the alignment stage if that was finished, else from the beginning.
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
    figures = judge(model, tokenizer, images, layers)
    blank = judge(model, tokenizer, images, [0], blank=True)["accuracy"]
    remove_deep_insert(model).save_pretrained(folder)
    weights = rename_as_published(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    processor.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    result = {
        **figures,
        "blank_accuracy": {kind: values[0] for kind, values in blank.items() if kind not in TEXT_KINDS},
        "deepest_layer": deepest_layers(figures["accuracy"]),
        "parameters": sum(p.numel() for p in model.parameters()),
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
