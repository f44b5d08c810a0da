"""`deepinsert demo`: all commands on the tiny backbone, each with the options that a user would give.

Every step writes the run folder of its command. A demo that is started again keeps the finished steps.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deepinsert.backbones.loading import TINY
from deepinsert.controller.runs.atomic_files import write_json
from deepinsert.controller.runs.command import run_command
from deepinsert.controller.runs.folder import read_result, same_run, write_result
from deepinsert.controller.runs.machine import describe_machine, machine_facts
from deepinsert.controller.studies.jobs import run_of
from deepinsert.controller.tables import terminal_table
from deepinsert.envs.data.rendering import render_instructions

from .options import (
    DemoOptions,
    EvaluateOptions,
    FinetuneOptions,
    RecommendOptions,
    SweepOptions,
    TrainPolicyOptions,
)

STEPS = ("sweep", "train-policy", "recommend", "finetune-baseline", "finetune", "evaluate")
INSTRUCTIONS = "instructions.json"


@dataclass(frozen=True)
class Size:
    """The amount of work in each step; an image has about four questions."""

    train_images: int
    held_out_images: int
    sweep_fraction: float
    episodes: int
    seeds: int
    steps: int
    batch_size: int
    timing_repeats: int


FULL = Size(
    train_images=300,
    held_out_images=120,
    sweep_fraction=0.1,
    episodes=40_000,
    seeds=3,
    steps=120,
    batch_size=16,
    timing_repeats=7,
)
QUICK = Size(
    train_images=18,
    held_out_images=9,
    sweep_fraction=0.3,
    episodes=4_096,
    seeds=1,
    steps=3,
    batch_size=8,
    timing_repeats=1,
)


def run(options: DemoOptions) -> dict[str, Any]:
    """Run every step that is not finished, write `result.json`, print a table, and return the result."""
    return run_command(options, partial(play_steps, options), summary_of(Path(options.out)), reuse=False)


def play_steps(options: DemoOptions, out: Path) -> dict[str, Any]:
    """Run the steps one after the other, and return the result of the demo."""
    demo = Demo(options, out, QUICK if options.quick else FULL)
    demo.render()
    sweep = demo.play("sweep", demo.sweep_options(), "what each insert layer costs without any training")
    policy = demo.play("train-policy", demo.policy_options(), "learn a layer for each question")
    advice = demo.play("recommend", demo.recommend_options(), "one layer for all of these questions")
    layer = int(advice["insert_layer"])
    finetunes = {
        "finetune-baseline": (0, "the baseline, image tokens entering at layer 0"),
        "finetune": (layer, f"the variant, image tokens entering at layer {layer}"),
    }
    for name, (insert_layer, aim) in finetunes.items():
        demo.play(name, demo.finetune_options(name, insert_layer), aim)
    evaluation = demo.play("evaluate", demo.evaluate_options(tuple(finetunes)), "both on unseen images")
    return {
        "insert_layer": layer,
        "num_layers": sweep["num_layers"],
        "skip_weight": options.skip_weight,
        "recommendation": {key: value for key, value in advice.items() if key != "per_prompt"},
        "policy": {key: policy[key] for key in ("reward", "difference", "share_of_gap", "verdict")},
        "variants": evaluation["variants"],
        "seconds": demo.seconds,
        "machine": machine_facts(),
    }


class Demo:
    """The demo's folder and its steps; `seconds` holds the duration of each finished step."""

    def __init__(self, options: DemoOptions, out: Path, size: Size) -> None:
        self.options = options
        self.out = out
        self.size = size
        finished = (out / "result.json").is_file()
        self.seconds: dict[str, float] = read_result(out)["seconds"] if finished else {}

    def render(self) -> None:
        """Draw the images and questions; remove steps that were computed from other data or other weights.

        The tiny backbone was not trained on these images. Held-out images are drawn with another seed.
        """
        sources = {
            "seed": self.options.seed,
            "train_images": self.size.train_images,
            "held_out_images": self.size.held_out_images,
            "backbone": hashlib.sha256((TINY / "model.safetensors").read_bytes()).hexdigest(),
        }
        folder = self.out / "data"
        print(f"Step 0 of {len(STEPS)}: data - images with questions, drawn here", flush=True)
        if (folder / "result.json").is_file() and read_result(folder) == sources:
            return
        for step in STEPS:
            self.remove(step)
        render_instructions(folder / "train", self.size.train_images, 2 * self.options.seed)
        render_instructions(folder / "held_out", self.size.held_out_images, 2 * self.options.seed + 1)
        write_json(folder / "config.json", {"command": "demo", "options": sources})
        write_result(folder, sources)

    def play(self, name: str, options: Any, aim: str) -> dict[str, Any]:
        """Return the result of a step, from its run folder if it is finished there with these options."""
        number = STEPS.index(name) + 1
        print(f"\nStep {number} of {len(STEPS)}: {name} - {aim}", flush=True)
        folder = self.out / name
        if not same_run(options):
            self.remove(name)
        elif (folder / "result.json").is_file():
            print(f"already finished in {folder}", flush=True)
            return read_result(folder)
        for later in STEPS[number:]:
            if (self.out / later / "result.json").is_file():
                self.remove(later)  # it was computed from what this step replaces
        started = time.perf_counter()
        result: dict[str, Any] = run_of(options)(options)
        self.seconds[name] = time.perf_counter() - started
        return result

    def remove(self, step: str) -> None:
        """Remove the run folder of a step, if there is one."""
        if (self.out / step / "config.json").is_file():
            shutil.rmtree(self.out / step)

    def data(self, part: str) -> Path:
        """The instruction file of the part "train" or "held_out"."""
        return self.out / "data" / part / INSTRUCTIONS

    def sweep_options(self) -> SweepOptions:
        """Options of the sweep over the untouched backbone."""
        return SweepOptions(
            out=self.out / "sweep",
            data=self.data("train"),
            fraction=self.size.sweep_fraction,
            seed=self.options.seed,
        )

    def policy_options(self) -> TrainPolicyOptions:
        """Options of the training of the layer policy."""
        return TrainPolicyOptions(
            out=self.out / "train-policy",
            data=self.data("train"),
            skip_weight=self.options.skip_weight,
            steps=self.size.episodes,
            seeds=self.size.seeds,
            seed=self.options.seed,
        )

    def recommend_options(self) -> RecommendOptions:
        """Options of the recommendation for the training data."""
        return RecommendOptions(
            out=self.out / "recommend",
            policy=self.out / "train-policy",
            data=self.data("train"),
            seed=self.options.seed,
        )

    def finetune_options(self, name: str, insert_layer: int) -> FinetuneOptions:
        """Options of the finetuning `name` at an insert layer."""
        return FinetuneOptions(
            out=self.out / name,
            data=self.data("train"),
            insert_layer=insert_layer,
            method="full",
            learning_rate=3e-4,
            steps=self.size.steps,
            batch_size=self.size.batch_size,
            gradient_accumulation=1,
            seed=self.options.seed,
        )

    def evaluate_options(self, variants: tuple[str, ...]) -> EvaluateOptions:
        """Options of the evaluation of the finetuned models on held-out images."""
        return EvaluateOptions(
            out=self.out / "evaluate",
            data=self.data("held_out"),
            variants=tuple(self.out / name for name in variants),
            batch_size=self.size.batch_size,
            timing_repeats=self.size.timing_repeats,
            seed=self.options.seed,
        )


def summary_of(out: Path) -> Callable[[dict[str, Any]], str]:
    """Return what renders the result of the demo in the folder `out` for the terminal."""
    return lambda result: summary(result, read_result(out / "evaluate"), out)


def summary(result: dict[str, Any], evaluation: dict[str, Any], out: Path) -> str:
    """Render the closing table and the sentences around it for the terminal."""
    baseline, variant = evaluation["variants"][:2]
    layer, layers = result["insert_layer"], result["num_layers"]
    low, high = variant["accuracy_difference_interval"]
    sentences = [
        f"In right answers the variant is {100 * variant['accuracy_difference']:+.1f} points from the "
        f"baseline (95 % interval {100 * low:+.1f} to {100 * high:+.1f}); its prefill takes "
        f"{percent(variant['time_ratio'])} of the time.",
        result["policy"]["verdict"],
    ]
    if layer == 0:
        sentences.insert(
            0,
            "The recommended layer is 0: at this skip weight skipping does not pay, so the models are alike.",
        )
    pictures = [picture for step in STEPS for picture in sorted((out / step).glob("*.png"))]
    return "\n".join(
        [
            "",
            f"The tiny backbone has {layers} decoder layers. In the baseline, image tokens go through all of "
            f"them; in the variant they enter at layer {layer}.",
            f"Both were finetuned for the same steps and asked {evaluation['prompts']} questions about "
            f"{evaluation['images']} images that neither had seen.",
            "",
            terminal_table(["", "baseline", "variant"], rows(baseline, variant, layers), "<>"),
            "",
            *sentences,
            "",
            f"Measured on {describe_machine(result['machine'])}.",
            "Pictures:",
            *(f"  {picture}" for picture in pictures),
            f"The demo took {sum(result['seconds'].values()):.0f} s.",
        ]
    )


def rows(baseline: dict[str, Any], variant: dict[str, Any], layers: int) -> list[tuple[str, str, str]]:
    """Return the cells of the table: one line per figure, with baseline and variant side by side."""
    pair = (baseline, variant)
    kilobytes = [row["kv_cache_bytes"] / 1000 for row in pair]

    def line(name: str, cells: list[str]) -> tuple[str, str, str]:
        first, second = cells
        return name, first, second

    return [
        line("image tokens enter at layer", [f"{row['insert_layer']} of {layers}" for row in pair]),
        line("right answers", [f"{100 * row['accuracy']:.1f} %" for row in pair]),
        line("loss of answers (nats)", [f"{row['loss']:.3f}" for row in pair]),
        line("computation of a prefill (FLOPs)", [percent(row["flops"] / baseline["flops"]) for row in pair]),
        line("time of a prefill, measured", [percent(row["time_ratio"]) for row in pair]),
        line("memory of the KV cache", [percent(size / kilobytes[0]) for size in kilobytes]),
    ]


def percent(share: float) -> str:
    """Write a share as a whole percentage."""
    return f"{100 * share:.0f} %"
