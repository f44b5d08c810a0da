"""`deepinsert evaluate`: compares variants with a baseline, on the same prompts and in one run.

It measures accuracy, loss, FLOPs, prefill and decode time, and KV-cache bytes, over all prompts and by
source. Variants are finetuned models, a backbone at fixed insert layers, and a policy that chooses each
prompt's layer.
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
from deepinsert.controller.metrics.benchmark import (
    Benchmark,
    Example,
    Score,
    check_images,
    promptable_benchmark,
)
from deepinsert.controller.options import EvaluateOptions
from deepinsert.controller.prompt_selection import read_data
from deepinsert.controller.runs.atomic_files import atomic_file, to_json
from deepinsert.controller.runs.command import run_command
from deepinsert.controller.runs.machine import machine_facts
from deepinsert.envs.prompts import Prompt, prompts_from

from .comparison import Comparison, Predictions
from .evaluation_pictures import plot
from .evaluation_summary import summary
from .table1 import INSTRUCTIONS, write_table1
from .timing import DECODE_TOKENS
from .variants import Variant, load_variants


def run(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluate all variants; return the result.

    The command writes `predictions/NAME.jsonl` for each variant, `table1.md`, `table1.json`, `figure1.png`,
    `evaluate.png` and `result.json`. All variants are in memory at once, because times are only comparable
    when they are measured in turns. Predictions that an interrupted run has written are read again, and a
    finished run is not repeated.

    Raises:
        ValueError: a variant is not a finished run of finetune, a policy belongs to another backbone, or an
            option cannot be used.
        DatasetError: the data cannot be used.
    """
    return run_command(options, partial(evaluate_variants, options), summary)


def evaluate_variants(options: EvaluateOptions, out: Path) -> dict[str, Any]:
    """Evaluate all variants, write tables and pictures to `out`, and return the result."""
    bench = promptable_benchmark(options.benchmark, metrics=options.metrics)
    examples, skipped = read_examples(options, bench)
    bench.score([""], examples[:1])  # a missing library must be noticed before hours of answers
    prompts = [example.prompt for example in examples]
    variants = load_variants(options, prompts)
    predictions = [predict(out, variant, bench, examples, options) for variant in variants]
    comparison = Comparison.measure(
        variants,
        bench,
        examples,
        predictions,
        batch_size=options.batch_size,
        repeats=options.timing_repeats,
        max_new_tokens=options.max_new_tokens,
        score_samples=options.score_samples,
    )
    result: dict[str, Any] = to_json(
        {
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
    )
    plot(result, out / "evaluate.png")
    write_table1([result], out)
    update_cards(variants, result, options.data.name, (out / "table1.md").read_text("utf-8"))
    return result


def read_examples(options: EvaluateOptions, bench: Benchmark) -> tuple[list[Example], list[str]]:
    """Return the questions that the options select, and descriptions of the records that were skipped.

    A fraction of a benchmark other than "instructions" is drawn image by image.

    Raises:
        DatasetError: the data cannot be used.
        ValueError: sources are named for a published benchmark.
    """
    if bench.name == INSTRUCTIONS:
        data = read_data(options)
        prompts = prompts_from(data, per="turn")
        examples = [Example(prompt, (prompt.answer,)) for prompt in prompts]
        return examples, [repr(record) for record in data.skipped]
    if options.sources:
        raise ValueError(
            f"--sources {options.sources}: --benchmark {bench.name} has no sources to select from"
        )
    examples = bench.read(options.data, options.image_root)
    if options.fraction < 1:
        images = sorted({example.prompt.image_key for example in examples})
        count = max(1, round(options.fraction * len(images)))
        selected = set(random.Random(options.seed).sample(images, count))
        examples = [example for example in examples if example.prompt.image_key in selected]
    check_images(examples)
    return examples, []


def update_cards(variants: Sequence[Variant], result: dict[str, Any], data: str, markdown: str) -> None:
    """Put Table 1 and each finetuned variant's figures into its model card.

    A card that cannot be written is reported on stderr and left as it is.

    Args:
        variants: the variants (V).
        result: the result of the evaluation.
        data: the name of the data file.
        markdown: Table 1.
    """
    name = result["benchmark"]["name"]
    for variant, row in zip(variants, result["variants"], strict=True):
        if variant.path is None or variant.policy is not None:
            continue
        metrics = {row["unit"]: row["score"] / 100 if row["unit"] == "accuracy" else row["score"]}
        metrics |= {} if row["loss"] is None else {"loss": row["loss"]}
        try:
            update_results(variant.path, markdown, metrics, data if name == INSTRUCTIONS else name)
        except OSError as error:
            print(f"{variant.path}: its model card was left as it is ({error})", file=sys.stderr)


def predictions_path(out: Path, variant: Variant) -> Path:
    """Return the file of a variant's predictions; colons become hyphens, which every system allows."""
    return out / "predictions" / f"{variant.name.replace(':', '-')}.jsonl"


def predict(
    out: Path, variant: Variant, bench: Benchmark, examples: Sequence[Example], options: EvaluateOptions
) -> Predictions:
    """Return answers and losses of a variant on every example.

    They are read from the variant's file, or computed and written there.

    Args:
        out: the run folder.
        variant: the variant.
        bench: the benchmark, with its rule.
        examples: its questions (P).
        options: batch size and length of the answers.

    Raises:
        ValueError: the loss of an answer is not finite.
    """
    path = predictions_path(out, variant)
    backbone, layers = variant.backbone, variant.insert_layers.tolist()
    rows = read_predictions(path, examples, backbone.fingerprint, layers)
    score = None
    if rows is None:
        prompts = [example.prompt for example in examples]
        size, label = options.batch_size, variant.name
        losses, flops = losses_and_flops(backbone, prompts, layers, size, f"{label}: loss")
        check_losses(label, prompts, losses)
        answers = generate_answers(
            backbone, prompts, layers, size, options.max_new_tokens, f"{label}: answers"
        )
        score = bench.score(answers, examples)
        rows = [
            {
                **_question_and_score(example, answers[row], score, row),
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


def _question_and_score(example: Example, answer: str, score: Score, row: int) -> dict[str, Any]:
    """Return the fields of a prediction that hold the question, the answer and its score."""
    item = None if score.items is None else float(score.items[row])
    return {
        "id": example.prompt.id,
        "source": example.prompt.source,
        "question": example.prompt.question,
        "prediction": answer,
        "reference": example.prompt.answer,
        "references": list(example.references),
        "score": item,
        "correct": None if item is None else item >= 1,
    }


def check_losses(label: str, prompts: Sequence[Prompt], losses: NDArray[np.float64]) -> None:
    """Raise `ValueError` if the loss (P) of a prompt with an answer is not finite; `label` is the variant."""
    invalid = [row for row, prompt in enumerate(prompts) if prompt.answer and not np.isfinite(losses[row])]
    if invalid:
        first = invalid[0]
        raise ValueError(
            f"{label}: the loss of prompt {prompts[first].id!r} is {losses[first]} ({len(invalid)} such): "
            "the model's weights are broken, or --dtype is too narrow for them"
        )


def read_predictions(
    path: Path, examples: Sequence[Example], model: str, insert_layers: Sequence[int]
) -> list[dict[str, Any]] | None:
    """Return the rows (P) that an earlier run wrote, or None if they belong to something else.

    Args:
        path: the file of predictions.
        examples: the questions that the rows must have (P).
        model: the fingerprint that the rows must have.
        insert_layers: the insert layers that the rows must have (P).
    """
    if not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    if len(rows) != len(examples):
        return None
    for row, example, layer in zip(rows, examples, insert_layers, strict=True):
        expected = {
            "id": example.prompt.id,
            "question": example.prompt.question,
            "reference": example.prompt.answer,
            "references": list(example.references),
            "model": model,
            "insert_layer": layer,
        }
        if {key: row.get(key) for key in expected} != expected:
            return None
    return rows
