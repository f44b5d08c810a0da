"""Losses of a data set at all insert layers: shared prefixes beside independent batched forwards.

    python benchmarks/reward_table.py --out runs/bench-table --data easy_vqa/train.json

Two arms in turns in one run. The independent one is the obvious way: prompts in padded batches, encoded once,
one forward at each insert layer with logits where the answers are. FLOPs are counted on both with torch's
counter, so that the time saved can be held against the work saved.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from deepinsert.backbones import Backbone, deep_insert, load_backbone
from deepinsert.backbones.loading import TINY, load_processor
from deepinsert.controller.options import RunOptions
from deepinsert.controller.performance.arms import Arm, Clock, Spent, compare, take_turns
from deepinsert.controller.performance.performance_tables import markdown_table, measured_on, text_table
from deepinsert.controller.performance.random_models import BENCH_MODELS, PATCH_SIZE, build_bench_model
from deepinsert.controller.runs.atomic_files import atomic_file, write_json
from deepinsert.controller.runs.folder import start_run, write_result
from deepinsert.controller.runs.machine import machine_facts
from deepinsert.envs.data.instructions import load_instructions
from deepinsert.envs.data.rendering import render_instructions
from deepinsert.envs.prompts import Prompt, prompts_from
from deepinsert.envs.rewards.block_forward import BlockForward
from deepinsert.envs.rewards.group_forward import GroupForward
from deepinsert.envs.rewards.keys import prompt_groups

BATCH = 32
"""Prompts in a batch of the independent arm."""
MOST_INDEPENDENT = 2
"""Questions about the large model's image that the independent arm runs, each for so many of them: they cost
the same."""
HEADINGS = (
    "backbone", "questions an image", "independent s", "shared s", "times as fast", "FLOPs allow",
    "of the saving kept", "largest difference",
)  # fmt: skip


@dataclass(kw_only=True)
class TableBenchOptions(RunOptions):
    """Time and FLOPs of a reward table with shared prefixes, beside independent batched forwards."""

    out: Path = Path("runs/bench-table")
    """Run folder; the same command again continues what it finds there."""
    data: Path | None = None
    """Instructions for the tiny backbone (easy-VQA's train.json); by default images that are drawn here."""
    images: int = 16
    """Images for the tiny backbone."""
    model: str = "bench"
    """LLaVA of random weights: bench (16 layers, width 512, 576 image tokens), bench-half, bench-tiny."""
    questions: tuple[int, ...] = (1, 9, 40)
    """Questions about the image of that model."""
    repeats: int = 3
    """Rounds; each runs both arms once."""
    device: str = "cpu"
    """A torch device such as cpu or cuda."""


@dataclass(frozen=True)
class Case:
    """Prompts about images, `groups[i]` about one each.

    The independent arm runs `independent`, whose time and FLOPs count `multiply` times.
    """

    name: str
    questions: str
    backbone: Backbone
    groups: list[list[Prompt]]
    independent: list[Prompt]
    multiply: float = 1.0


def run(options: TableBenchOptions) -> dict[str, Any]:
    """Write `result.json` with a row for each case and `table.md`; return the result."""
    out = start_run(options)
    torch.set_num_threads(1)  # as many as compute a reward table
    rows = []
    for case in cases(options, out):
        path = out / "cases" / f"{case.name}-{case.questions}.json".replace(" ", "-")
        if not path.is_file():
            print(f"{case.name}, {case.questions} questions an image", file=sys.stderr, flush=True)
            write_json(path, measure(case, options))
        rows.append(json.loads(path.read_text("utf-8")))
    result = {"rows": rows, "rounds": options.repeats, "machine": machine_facts(), "device": options.device}
    write_result(out, result)
    cells = [table_row(row) for row in rows]
    caption = f"{options.repeats} rounds on {measured_on(result)}; quartiles in brackets."
    with atomic_file(out / "table.md") as path:
        path.write_text(f"{markdown_table(HEADINGS, cells)}\n\n{caption}\n", "utf-8")
    print(f"{text_table(HEADINGS, cells)}\n{caption}")
    return result


def cases(options: TableBenchOptions, out: Path) -> Iterator[Case]:
    """The tiny backbone on a data set, then a LLaVA of random weights with more and more questions."""
    tiny = load_backbone("tiny", device=options.device)
    data = options.data or render_instructions(out / "data", options.images, options.seed)
    by_image: dict[str, list[Prompt]] = {}
    for prompt in prompts_from(load_instructions(data)):
        if prompt.images:
            by_image.setdefault(prompt.image_key, []).append(prompt)
    name = f"tiny, {Path(data).parent.name}" if options.data else "tiny, drawn images"
    nine = [group for group in by_image.values() if len(group) == 9][: options.images]
    first = [group[:1] for group in list(by_image.values())[: 2 * options.images]]
    as_found = list(by_image.values())[: options.images]
    mean = f"{np.mean([len(group) for group in as_found]):.1f} on average"
    for questions, groups in (("1", first), (mean, as_found), ("9", nine)):
        if groups:
            yield Case(name, questions, tiny, groups, list(chain.from_iterable(groups)))
    random = bench_backbone(options.model, options.device)
    label = f"LLaVA, {BENCH_MODELS[options.model]}"
    for count in options.questions:
        prompts = bench_prompts(count, BENCH_MODELS[options.model].side * PATCH_SIZE)
        some = prompts[:MOST_INDEPENDENT]
        yield Case(label, str(count), random, [prompts], some, count / len(some))


def bench_backbone(name: str, device: str = "cpu") -> Backbone:
    """A LLaVA of random weights with the tiny backbone's tokenizer."""
    processor = load_processor(TINY, AutoConfig.from_pretrained(TINY))
    side = BENCH_MODELS[name].side * PATCH_SIZE
    processor.patch_size = PATCH_SIZE
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    tokenizer = processor.tokenizer
    image_token = tokenizer.convert_tokens_to_ids(processor.image_token)
    model = build_bench_model(name, device, image_token=image_token, vocabulary=len(tokenizer))
    return Backbone(deep_insert(model), processor, name)


def bench_prompts(count: int, side: int) -> list[Prompt]:
    """Questions of 64 text tokens or so about one image, none the beginning of another."""
    image = Image.effect_noise((side, side), 64).convert("RGB")
    colours = ("red", "green", "blue", "yellow", "black", "white", "gray", "orange")
    prompts = []
    for number in range(count):
        words = [colours[(number >> shift) % 8] for shift in (0, 3)]
        question = " ".join([*words, "circle", "or square", "?"] * 7)
        prompt = Prompt.from_question(question, image, answer=words[0])
        prompts.append(replace(prompt, id=str(number)))
    return prompts


def measure(case: Case, options: TableBenchOptions) -> dict[str, Any]:
    """Both arms on all candidate layers: times of paired rounds, FLOPs, and how far their losses differ."""
    layers = list(range(case.backbone.num_layers))
    forward = GroupForward(case.backbone)
    prompts = list(chain.from_iterable(case.groups))
    blocks = [[prompts[index] for index in group] for group in prompt_groups(prompts)]

    def independent() -> np.ndarray:
        found = []
        for start in range(0, len(case.independent), BATCH):
            block = BlockForward(case.backbone, case.independent[start : start + BATCH])
            inputs = block.encode(slice(None))
            found.append(np.stack([block.losses(inputs, layer) for layer in layers], axis=1))
        return np.concatenate(found)

    def shared() -> np.ndarray:
        return np.concatenate([forward.run(block, layers).losses for block in blocks])

    flops, losses = zip(*(counted(work) for work in (independent, shared)), strict=True)
    if forward.apart:
        raise ValueError(f"{case.name}: prefixes cannot be shared: {forward.apart}")
    clock = Clock(case.backbone.device)  # counting was the warm-up
    samples = take_turns([timed(independent, clock), timed(shared, clock)], options.repeats, [])["all"]
    samples.wall[:, 0] *= case.multiply
    samples.cpu[:, 0] *= case.multiply
    ratio = flops[1] / (flops[0] * case.multiply)
    arms = compare(samples, [1, ratio])
    return {
        "backbone": case.name,
        "questions": case.questions,
        "prompts": sum(map(len, case.groups)),
        "insert_layers": layers,
        "independent": arms[0],
        "shared": arms[1],
        "faster": 1 / arms[1]["time_ratio"],
        "faster_quartiles": [1 / bound for bound in reversed(arms[1]["time_ratio_quartiles"])],
        "flops_allow": 1 / ratio,
        "largest_difference": float(np.abs(losses[0] - losses[1][: len(losses[0])]).max()),
    }


def counted(work: Callable[[], np.ndarray]) -> tuple[int, np.ndarray]:
    """FLOPs of `work`, and what it returns."""
    with FlopCounterMode(display=False) as counter:
        result = work()
    return counter.get_total_flops(), result


def timed(work: Callable[[], Any], clock: Clock) -> Arm:
    """`work` as an arm that is measured as a whole."""

    def arm() -> dict[str, Spent]:
        started = clock.now()
        work()
        return {"all": clock.since(started)}

    return arm


def table_row(row: dict[str, Any]) -> tuple[str, ...]:
    low, high = row["faster_quartiles"]
    kept = row["shared"]["saving_kept"]
    return (
        row["backbone"],
        row["questions"],
        f"{row['independent']['ms'] / 1000:.2f}",
        f"{row['shared']['ms'] / 1000:.2f}",
        f"{row['faster']:.2f} [{low:.2f}, {high:.2f}]",
        f"{row['flops_allow']:.2f}",
        "-" if kept is None else f"{kept:.0%}",
        f"{row['largest_difference']:.1e}",
    )


if __name__ == "__main__":
    run(tyro.cli(TableBenchOptions, description=__doc__))
