"""`deepinsert evaluate`: variants beside the baseline, on the same prompts and in one run.

Accuracy, loss, FLOPs, measured prefill and decode time and KV-cache bytes, over all prompts and by source; of
finetuned models, of a backbone at fixed insert layers, and of a policy that chooses each prompt's layer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from envs.prompts import Prompt, prompts_from

from ..answers import generate_answers, losses_and_flops
from ..data import read_data
from ..metrics.exact_match import exact_match
from ..option_checks import check
from ..options import EvaluateOptions
from ..runs import machine, read_result, replacing, start_run, write_result
from .comparison import Comparison, Predictions, plot, table
from .judged import Variant, load_variants
from .timing import DECODE_TOKENS


def run(options: EvaluateOptions) -> dict[str, Any]:
    """Write `predictions/NAME.jsonl` for each variant, `evaluate.png` and `result.json`; return the result.

    All variants are in memory at once: their times are only comparable when measured in turns. Predictions
    that a killed run has already written are kept, a finished run is not repeated. Raises `ValueError` for a
    variant that is not a finished run of finetune or a policy of another backbone, `DatasetError` for data
    that cannot be used.
    """
    check(options)
    out = start_run(options)
    if (out / "result.json").is_file():
        result = read_result(out)
        print(table(result))
        return result
    data = read_data(options)
    prompts = prompts_from(data, per="turn")
    variants = load_variants(options, prompts)
    predictions = [predict(predictions_path(out, variant), variant, prompts, options) for variant in variants]
    comparison = Comparison.measure(
        variants, prompts, predictions, options.batch_size, options.timing_repeats
    )
    result = {
        "variants": [comparison.row(index) for index in range(len(variants))],
        "baseline": variants[0].name,
        "prompts": len(prompts),
        "images": len({prompt.image_key for prompt in prompts if prompt.images}),
        "skipped": [repr(record) for record in data.skipped],
        "timing": {
            "batch_size": options.batch_size,
            "repeats": options.timing_repeats,
            "decode_tokens": DECODE_TOKENS,
            "machine": machine(),
        },
    }
    plot(result, out / "evaluate.png")
    write_result(out, result)
    print(table(result))
    return result


def predictions_path(out: Path, variant: Variant) -> Path:
    """Where a variant's predictions are written; not every system has file names with a colon."""
    return out / "predictions" / f"{variant.name.replace(':', '-')}.jsonl"


def predict(path: Path, variant: Variant, prompts: Sequence[Prompt], options: EvaluateOptions) -> Predictions:
    """Answers and losses of a variant on every prompt, read from the JSONL at `path` or written there."""
    backbone, layers = variant.backbone, variant.insert_layers.tolist()
    rows = read_predictions(path, prompts, backbone.fingerprint, layers)
    if rows is None:
        size, label = options.batch_size, variant.name
        losses, flops = losses_and_flops(backbone, prompts, layers, size, f"{label}: loss")
        answers = generate_answers(
            backbone, prompts, layers, size, options.max_new_tokens, f"{label}: answers"
        )
        rows = [
            {
                "id": prompt.id,
                "source": prompt.source,
                "question": prompt.question,
                "prediction": answer,
                "reference": prompt.answer,
                "correct": exact_match(answer, prompt.answer),
                "loss": float(loss),
                "flops": cost.tolist(),
                "model": backbone.fingerprint,
                "insert_layer": layer,
            }
            for prompt, answer, loss, cost, layer in zip(prompts, answers, losses, flops, layers, strict=True)
        ]
        with replacing(path) as temporary:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            temporary.write_text("".join(lines), encoding="utf-8")
    return Predictions(
        answers=[row["prediction"] for row in rows],
        correct=np.array([row["correct"] for row in rows], dtype=np.float64),
        losses=np.array([row["loss"] for row in rows], dtype=np.float64),
        flops=np.array([row["flops"] for row in rows], dtype=np.float64),
    )


def read_predictions(
    path: Path, prompts: Sequence[Prompt], model: str, insert_layers: Sequence[int]
) -> list[dict[str, Any]] | None:
    """Rows that an earlier start wrote; None unless of this model (its fingerprint), layers and prompts."""
    if not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    if len(rows) != len(prompts):
        return None
    for row, prompt, layer in zip(rows, prompts, insert_layers, strict=True):
        said = {"id": prompt.id, "question": prompt.question, "reference": prompt.answer}
        want = {**said, "model": model, "insert_layer": layer}
        if {key: row.get(key) for key in want} != want:
            return None
    return rows
