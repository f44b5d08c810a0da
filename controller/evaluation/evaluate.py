"""`deepinsert evaluate`: variants beside the baseline, on the same prompts and in one run.

Accuracy, loss, FLOPs, measured prefill and decode time and KV-cache bytes, over all prompts and by source; of
finetuned models, of a backbone at fixed insert layers, and of a policy that chooses each prompt's layer.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepinsert.controller.answers.batched import generate_answers, losses_and_flops
from deepinsert.controller.finetuning.model_card import update_results
from deepinsert.controller.metrics.benchmark import Benchmark, Example, check_images, promptable_benchmark
from deepinsert.controller.options import EvaluateOptions
from deepinsert.controller.prompt_selection import read_data
from deepinsert.controller.runs.atomic_files import atomic_file, to_json
from deepinsert.controller.runs.command import run_command
from deepinsert.controller.runs.machine import machine_facts
from deepinsert.envs.prompts import Prompt, prompts_from

from .comparison import Comparison, Predictions
from .evaluation_pictures import plot
from .report import table, write_table1
from .timing import DECODE_TOKENS
from .variants import Variant, load_variants

DEFAULT = "instructions"


def run(options: EvaluateOptions) -> dict[str, Any]:
    """Write `predictions/NAME.jsonl` for each variant, `table1.md`, `table1.json`, `figure1.png`,
    `evaluate.png` and `result.json`; return the result.

    All variants are in memory at once: their times are only comparable when measured in turns. Predictions
    that a killed run has already written are kept, a finished run is not repeated. Raises `ValueError` for a
    variant that is not a finished run of finetune or a policy of another backbone, `DatasetError` for data
    that cannot be used.
    """
    return run_command(options, partial(evaluate, options), table)


def evaluate(options: EvaluateOptions, out: Path) -> dict[str, Any]:
    """Measure the variants, write everything but `result.json` to the run folder, and return the result."""
    bench = promptable_benchmark(options.benchmark, metrics=options.metrics)
    examples, skipped = read_examples(options, bench)
    bench.score([""], examples[:1])  # a library that the rule misses must not show after hours of answers
    prompts = [example.prompt for example in examples]
    variants = load_variants(options, prompts)
    predictions = [predict(out, variant, bench, examples, options) for variant in variants]
    comparison = Comparison.measure(
        variants,
        bench,
        examples,
        predictions,
        options.batch_size,
        options.timing_repeats,
        options.max_new_tokens,
        options.score_samples,
    )
    measurements = {
        "benchmark": {"name": bench.name, "source": bench.source, "settings": bench.settings},
        "variants": [comparison.row(index) for index in range(len(variants))],
        "baseline": variants[0].name,
        "prompts": len(prompts),
        "images": len({prompt.image_key for prompt in prompts if prompt.images}),
        "skipped": skipped,
        "timing": {
            "batch_size": options.batch_size,
            "repeats": options.timing_repeats,
            "decode_tokens": DECODE_TOKENS,
            "machine": machine_facts(),
        },
    }
    result: dict[str, Any] = to_json(measurements)
    plot(result, out / "evaluate.png")
    write_table1([result], out)
    update_cards(variants, result, options.data.name, (out / "table1.md").read_text("utf-8"))
    return result


def read_examples(options: EvaluateOptions, bench: Benchmark) -> tuple[list[Example], list[str]]:
    """The questions that the options name, and what had to be left out of them.

    A share of another benchmark than "instructions" is drawn image by image. Raises `DatasetError` for data
    that cannot be used, `ValueError` for sources of another benchmark.
    """
    if bench.name == DEFAULT:
        data = read_data(options)
        prompts = prompts_from(data, per="turn")
        examples = [Example(prompt, (prompt.answer,)) for prompt in prompts]
        return examples, [repr(record) for record in data.skipped]
    if options.sources:
        raise ValueError(f"--sources {options.sources}: --benchmark {bench.name} has none to choose from")
    examples = bench.read(options.data, options.image_root)
    if options.fraction < 1:
        images = sorted({example.prompt.image_key for example in examples})
        count = max(1, round(options.fraction * len(images)))
        kept = set(random.Random(options.seed).sample(images, count))
        examples = [example for example in examples if example.prompt.image_key in kept]
    check_images(examples)
    return examples, []


def update_cards(variants: Sequence[Variant], result: dict[str, Any], data: str, markdown: str) -> None:
    """Put the table and each finetuned variant's figures into its model card; where a folder cannot be
    written to, say so and go on."""
    name = result["benchmark"]["name"]
    for variant, row in zip(variants, result["variants"], strict=True):
        if variant.path is None or variant.policy is not None:
            continue
        metrics = {row["unit"]: row["score"] / 100 if row["unit"] == "accuracy" else row["score"]}
        metrics |= {} if row["loss"] is None else {"loss": row["loss"]}
        try:
            update_results(variant.path, markdown, metrics, data if name == DEFAULT else name)
        except OSError as error:
            print(f"{variant.path}: its model card was left as it is ({error})", file=sys.stderr)


def predictions_path(out: Path, variant: Variant) -> Path:
    """Where a variant's predictions are written; not every system has file names with a colon."""
    return out / "predictions" / f"{variant.name.replace(':', '-')}.jsonl"


def predict(
    out: Path, variant: Variant, bench: Benchmark, examples: Sequence[Example], options: EvaluateOptions
) -> Predictions:
    """Answers and losses of a variant on every example, read from its JSONL in `out` or written there."""
    path = predictions_path(out, variant)
    prompts = [example.prompt for example in examples]
    backbone, layers = variant.backbone, variant.insert_layers.tolist()
    rows = read_predictions(path, examples, backbone.fingerprint, layers)
    score = None
    if rows is None:
        size, label = options.batch_size, variant.name
        losses, flops = losses_and_flops(backbone, prompts, layers, size, f"{label}: loss")
        check_losses(label, prompts, losses)
        answers = generate_answers(
            backbone, prompts, layers, size, options.max_new_tokens, f"{label}: answers"
        )
        score = bench.score(answers, examples)
        items = score.items
        rows = [
            {
                "id": example.prompt.id,
                "source": example.prompt.source,
                "question": example.prompt.question,
                "prediction": answers[row],
                "reference": example.prompt.answer,
                "references": list(example.references),
                "score": None if items is None else float(items[row]),
                "correct": None if items is None else bool(items[row] >= 1),
                "loss": None if np.isnan(losses[row]) else float(losses[row]),
                "flops": flops[row].tolist(),
                "model": backbone.fingerprint,
                "insert_layer": layers[row],
            }
            for row, example in enumerate(examples)
        ]
        with atomic_file(path) as temporary:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            temporary.write_text("".join(lines), encoding="utf-8")
    answers = [row["prediction"] for row in rows]
    return Predictions(
        answers=answers,
        score=bench.score(answers, examples) if score is None else score,
        losses=np.array([np.nan if row["loss"] is None else row["loss"] for row in rows]),
        flops=np.array([row["flops"] for row in rows], dtype=np.float64),
    )


def check_losses(label: str, prompts: Sequence[Prompt], losses: NDArray[np.float64]) -> None:
    """Raises `ValueError` where the loss (P) of an answer is not finite."""
    odd = [row for row, prompt in enumerate(prompts) if prompt.answer and not np.isfinite(losses[row])]
    if odd:
        raise ValueError(
            f"{label}: the loss of prompt {prompts[odd[0]].id!r} is {losses[odd[0]]} ({len(odd)} such): the "
            "model's weights are broken, or --dtype is too narrow for them"
        )


def read_predictions(
    path: Path, examples: Sequence[Example], model: str, insert_layers: Sequence[int]
) -> list[dict[str, Any]] | None:
    """Rows that an earlier start wrote; None unless of this model (its fingerprint), layers and examples."""
    if not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    if len(rows) != len(examples):
        return None
    for row, example, layer in zip(rows, examples, insert_layers, strict=True):
        prompt = example.prompt
        said = {"id": prompt.id, "question": prompt.question, "reference": prompt.answer}
        want = {**said, "references": list(example.references), "model": model, "insert_layer": layer}
        if {key: row.get(key) for key in want} != want:
            return None
    return rows
