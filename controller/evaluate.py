"""`deepinsert evaluate`: variants beside the baseline, on the same prompts and in one run.

Accuracy, loss, FLOPs, measured prefill and decode time and KV-cache bytes, over all prompts and by source.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backbones import load_backbone
from envs.prompts import Prompt, prompts_from

from .answers import generate_answers, losses_and_flops
from .comparison import Comparison, Predictions, Variant, plot, table
from .data import read_data
from .metrics import exact_match
from .options import EvaluateOptions, check
from .runs import machine, read_result, replacing, start_run, write_result
from .timing import DECODE_TOKENS


def run(options: EvaluateOptions) -> dict[str, Any]:
    """Write `predictions/NAME.jsonl` for each variant, `evaluate.png` and `result.json`; return the result.

    All variants are in memory at once: their times are only comparable when measured in turns. Predictions
    that a killed run has already written are kept, a finished run is not repeated. Raises `ValueError` for a
    variant that is not a finished run of finetune, `DatasetError` for data that cannot be used.
    """
    check(options)
    out = start_run(options)
    if (out / "result.json").is_file():
        result = read_result(out)
        print(table(result))
        return result
    data = read_data(options)
    prompts = prompts_from(data, per="turn")
    variants = load_variants(options)
    predictions = [
        predict(out / "predictions" / f"{variant.name}.jsonl", variant, prompts, options)
        for variant in variants
    ]
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


def load_variants(options: EvaluateOptions) -> list[Variant]:
    """The models to judge, the baseline first; the backbone itself where `--variants` names none."""
    if not options.variants:
        backbone = load_backbone(options.backbone, device=options.device, dtype=options.dtype)
        return [Variant(Path(options.backbone).name, None, backbone)]
    found = []
    for name, folder in zip(variant_names(options.variants), options.variants, strict=True):
        checkpoint = folder / "checkpoint"
        if not (folder / "result.json").is_file() or not (checkpoint / "config.json").is_file():
            raise ValueError(
                f"--variants {folder}: not the folder of a finished finetune (it needs result.json and "
                "checkpoint/); run finetune with that --out, the same command continues a run cut off"
            )
        backbone = load_backbone(checkpoint, device=options.device, dtype=options.dtype)
        found.append(Variant(name, folder, backbone))
    return found


def variant_names(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder: its own, with as many of its parents' as make all names different."""
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"--variants {' '.join(map(str, folders))}: a folder is given twice")
    longest = max(len(path.parts) for path in resolved)
    for depth in range(1, longest + 1):
        names = ["-".join(part.strip("/") for part in path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"--variants {' '.join(map(str, folders))}: no names tell these folders apart")


def predict(path: Path, variant: Variant, prompts: Sequence[Prompt], options: EvaluateOptions) -> Predictions:
    """Answers and losses of a variant on every prompt, read from the JSONL at `path` or written there."""
    backbone = variant.backbone
    model = {"model": backbone.fingerprint, "insert_layer": backbone.insert_layer}
    rows = read_predictions(path, prompts, model)
    if rows is None:
        losses, flops = losses_and_flops(backbone, prompts, options.batch_size, f"{variant.name}: loss")
        answers = generate_answers(
            backbone, prompts, options.batch_size, options.max_new_tokens, f"{variant.name}: answers"
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
                **model,
            }
            for prompt, answer, loss, cost in zip(prompts, answers, losses, flops, strict=True)
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
    path: Path, prompts: Sequence[Prompt], model: dict[str, Any]
) -> list[dict[str, Any]] | None:
    """Rows that an earlier start wrote; None unless of this model, layer and prompts."""
    if not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    wanted = [
        {"id": prompt.id, "question": prompt.question, "reference": prompt.answer, **model}
        for prompt in prompts
    ]
    if len(rows) != len(wanted):
        return None
    same = all({key: row.get(key) for key in want} == want for row, want in zip(rows, wanted, strict=True))
    return rows if same else None
