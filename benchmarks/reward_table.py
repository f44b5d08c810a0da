"""Compare two ways to compute losses at all insert layers: shared prefixes and independent forwards.

    python benchmarks/reward_table.py --out runs/bench-table --data easy_vqa/train.json

Both ways are arms that run in turns. The independent arm is the obvious one: prompts in padded batches,
encoded once, with one forward per insert layer and logits only at the answers. Torch's counter counts the
FLOPs of both arms, so that the saved time can be compared with the saved work.
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
from deepinsert.controller.performance.arms import Arm, Clock, Duration, compare, take_turns
from deepinsert.controller.performance.performance_tables import describe_setup, figures_table
from deepinsert.controller.performance.random_models import BENCH_MODELS, PATCH_SIZE, build_bench_model
from deepinsert.controller.runs.atomic_files import atomic_file, write_json
from deepinsert.controller.runs.folder import start_run, write_result
from deepinsert.controller.runs.machine import machine_facts
from deepinsert.controller.tables import markdown_table
from deepinsert.envs.data.instructions import load_instructions
from deepinsert.envs.data.rendering import render_instructions
from deepinsert.envs.prompts import Prompt, prompts_from
from deepinsert.envs.rewards.block_forward import BlockForward
from deepinsert.envs.rewards.group_forward import GroupForward
from deepinsert.envs.rewards.keys import prompt_groups

BATCH = 32
"""Prompts per batch of the independent arm."""
INDEPENDENT_QUESTIONS = 2
"""Questions about the large model's image that the independent arm runs at most; the others cost the same, so
their time is extrapolated."""
HEADINGS = (
    "backbone", "questions per image", "independent s", "shared s", "times as fast", "FLOPs allow",
    "of the saving kept", "largest difference",
)  # fmt: skip


@dataclass(kw_only=True)
class TableBenchOptions(RunOptions):
    """Time and FLOPs of a reward table with shared prefixes, beside independent batched forwards."""

    out: Path = Path("runs/bench-table")
    """Run folder; the same command continues a run that it finds there."""
    data: Path | None = None
    """Instructions for the tiny backbone (easy-VQA's train.json); by default images are rendered."""
    images: int = 16
    """Images for the tiny backbone."""
    model: str = "bench"
    """LLaVA with random weights: bench (16 layers, width 512, 576 image tokens), bench-half, bench-tiny."""
    questions: tuple[int, ...] = (1, 9, 40)
    """Numbers of questions about the image of that model."""
    repeats: int = 3
    """Rounds; each runs both arms once."""
    device: str = "cpu"
    """A torch device such as cpu or cuda."""


@dataclass(frozen=True)
class Case:
    """Prompts about images; `groups[i]` holds those about one image.

    The independent arm runs only `independent`; its time and FLOPs count `multiply` times.
    """

    name: str
    questions: str
    backbone: Backbone
    groups: list[list[Prompt]]
    independent: list[Prompt]
    multiply: float = 1.0


def run(options: TableBenchOptions) -> dict[str, Any]:
    """Write `result.json`, with a row per case, and `table.md`; return the result."""
    out = start_run(options)
    torch.set_num_threads(1)  # reward tables are computed with one thread
    rows = []
    for case in cases(options, out):
        path = out / "cases" / f"{case.name}-{case.questions}.json".replace(" ", "-")
        if not path.is_file():
            print(f"{case.name}, {case.questions} questions per image", file=sys.stderr, flush=True)
            write_json(path, measure(case, options))
        rows.append(json.loads(path.read_text("utf-8")))
    result = {"rows": rows, "rounds": options.repeats, "machine": machine_facts(), "device": options.device}
    write_result(out, result)
    cells = [table_row(row) for row in rows]
    caption = f"{options.repeats} rounds on {describe_setup(result)}; quartiles in brackets."
    with atomic_file(out / "table.md") as path:
        path.write_text(f"{markdown_table(HEADINGS, cells)}\n\n{caption}\n", "utf-8")
    print(f"{figures_table(HEADINGS, cells)}\n{caption}")
    return result


def cases(options: TableBenchOptions, out: Path) -> Iterator[Case]:
    """Yield the tiny backbone on a data set, then a LLaVA with random weights and more and more questions."""
    tiny = load_backbone("tiny", device=options.device)
    data = options.data or render_instructions(out / "data", options.images, options.seed)
    by_image: dict[str, list[Prompt]] = {}
    for prompt in prompts_from(load_instructions(data)):
        if prompt.images:
            by_image.setdefault(prompt.image_key, []).append(prompt)
    name = f"tiny, {Path(data).parent.name}" if options.data else "tiny, drawn images"
    nine_each = [group for group in by_image.values() if len(group) == 9][: options.images]
    one_each = [group[:1] for group in list(by_image.values())[: 2 * options.images]]
    all_each = list(by_image.values())[: options.images]
    mean = f"{np.mean([len(group) for group in all_each]):.1f} on average"
    for questions, groups in (("1", one_each), (mean, all_each), ("9", nine_each)):
        if groups:
            yield Case(name, questions, tiny, groups, list(chain.from_iterable(groups)))
    large = bench_backbone(options.model, options.device)
    label = f"LLaVA, {BENCH_MODELS[options.model]}"
    for count in options.questions:
        prompts = bench_prompts(count, BENCH_MODELS[options.model].side * PATCH_SIZE)
        independent = prompts[:INDEPENDENT_QUESTIONS]
        yield Case(label, str(count), large, [prompts], independent, count / len(independent))


def bench_backbone(name: str, device: str = "cpu") -> Backbone:
    """Return a LLaVA with random weights and the tiny backbone's tokenizer."""
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
    """Return questions of about 64 text tokens about one image, none of which begins with another."""
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
    """Measure both arms on all candidate layers: times of paired rounds, FLOPs, difference of losses."""
    layers = list(range(case.backbone.num_layers))
    forward = GroupForward(case.backbone)
    prompts = list(chain.from_iterable(case.groups))
    blocks = [[prompts[index] for index in group] for group in prompt_groups(prompts)]

    def independent() -> np.ndarray:
        losses = []
        for start in range(0, len(case.independent), BATCH):
            block = BlockForward(case.backbone, case.independent[start : start + BATCH])
            inputs = block.encode(slice(None))
            losses.append(np.stack([block.losses(inputs, layer) for layer in layers], axis=1))
        return np.concatenate(losses)

    def shared() -> np.ndarray:
        return np.concatenate([forward.run(block, layers).losses for block in blocks])

    flops, losses = zip(*(count_flops(work) for work in (independent, shared)), strict=True)
    if forward.unshared_reason:
        raise ValueError(f"{case.name}: prefixes cannot be shared: {forward.unshared_reason}")
    clock = Clock(case.backbone.device)
    arms = [timed_arm(independent, clock), timed_arm(shared, clock)]
    samples = take_turns(arms, options.repeats, warm_up=[])["all"]  # counting was the warm-up
    samples.wall[:, 0] *= case.multiply
    samples.cpu[:, 0] *= case.multiply
    ratio = flops[1] / (flops[0] * case.multiply)
    independent_times, shared_times = compare(samples, [1, ratio])
    return {
        "backbone": case.name,
        "questions": case.questions,
        "prompts": sum(map(len, case.groups)),
        "insert_layers": layers,
        "independent": independent_times,
        "shared": shared_times,
        "faster": 1 / shared_times["time_ratio"],
        "faster_quartiles": [1 / bound for bound in reversed(shared_times["time_ratio_quartiles"])],
        "flops_allow": 1 / ratio,
        "largest_difference": float(np.abs(losses[0] - losses[1][: len(losses[0])]).max()),
    }


def count_flops(work: Callable[[], np.ndarray]) -> tuple[int, np.ndarray]:
    """Return the FLOPs of `work`, and its result."""
    with FlopCounterMode(display=False) as counter:
        result = work()
    return counter.get_total_flops(), result


def timed_arm(work: Callable[[], Any], clock: Clock) -> Arm:
    """Return an arm that runs `work` and measures it as a whole."""

    def arm() -> dict[str, Duration]:
        start = clock.now()
        work()
        return {"all": clock.since(start)}

    return arm


def table_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells below `HEADINGS` for one case."""
    low, high = row["faster_quartiles"]
    saving_kept = row["shared"]["saving_kept"]
    return (
        row["backbone"],
        row["questions"],
        f"{row['independent']['ms'] / 1000:.2f}",
        f"{row['shared']['ms'] / 1000:.2f}",
        f"{row['faster']:.2f} [{low:.2f}, {high:.2f}]",
        f"{row['flops_allow']:.2f}",
        "-" if saving_kept is None else f"{saving_kept:.0%}",
        f"{row['largest_difference']:.1e}",
    )


if __name__ == "__main__":
    run(tyro.cli(TableBenchOptions, description=__doc__))
