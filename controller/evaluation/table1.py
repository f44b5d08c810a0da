"""The paper's Table 1 from the results of one or several evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepinsert.controller.runs.atomic_files import atomic_file, write_json
from deepinsert.controller.runs.machine import describe_machine
from deepinsert.controller.tables import markdown_table

from .evaluation_pictures import figure1, layer_of

INSTRUCTIONS = "instructions"
"""The benchmark of a user's own data, whose sources are the columns of the table."""
NOT_AVERAGED = {"perception score", "CIDEr"}
"""Units of MME and COCO, which are no percentages; the paper's averages leave MME out too."""
COSTS = ("prefill_ms", "time_ratio", "decode_time_ratio", "flops_ratio", "kv_cache_ratio")
Result = Mapping[str, Any]


def write_table1(results: Sequence[Result], out: Path) -> dict[str, Any]:
    """Write `table1.md`, `table1.json` and `figure1.png` of one or several results; return the table."""
    table = table1(results)
    write_json(out / "table1.json", table)
    with atomic_file(out / "table1.md") as temporary:
        temporary.write_text(markdown(table), "utf-8")
    figure1(table, out / "figure1.png")
    return table


def table1(results: Sequence[Result]) -> dict[str, Any]:
    """Return Table 1: one row per variant with its scores, their average, and its costs.

    There is one column per benchmark, or per source of instructions. Scores are in the benchmark's unit,
    accuracies in percent. The average is over the columns in percent (a single column is its own average),
    and None for a variant that lacks one. Costs are means over the results, and ratios are against the
    baseline. A p-value is McNemar's; `significant` tells whether it is below 0.05 or, without a p-value,
    whether the 95 % interval of the difference excludes 0.

    Raises:
        ValueError: results have different baselines, or a name stands for several insert layers.
    """
    baselines = sorted({result["baseline"] for result in results})
    if len(baselines) > 1:
        raise ValueError(
            f"the evaluations compare with different baselines ({', '.join(baselines)}): give the same "
            "variants, the baseline first, to each"
        )
    columns = [column for result in results for column in columns_of(result, len(results) > 1)]
    for column in columns:
        column["averaged"] = column["unit"] not in NOT_AVERAGED or len(columns) == 1
    names = dict.fromkeys(row["name"] for result in results for row in result["variants"])
    return {
        "columns": [{key: column[key] for key in ("name", "unit", "averaged")} for column in columns],
        "rows": [_row(name, results, columns) for name in names],
        "baseline": baselines[0],
        "prompts": sum(result["prompts"] for result in results),
        "machine": results[0]["timing"]["machine"],
        "batch_size": results[0]["variants"][0]["batch_size"],
    }


def _row(name: str, results: Sequence[Result], columns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the row of the variant `name`."""
    rows = [row for result in results for row in result["variants"] if row["name"] == name]
    layers = {row["insert_layer"] for row in rows}
    if len(layers) > 1:
        raise ValueError(f"variant {name!r} has insert layers {sorted(map(str, layers))}: rename one")
    scores = [column["scores"].get(name) for column in columns]
    averaged = [score for score, column in zip(scores, columns, strict=True) if column["averaged"]]
    costs = [costs_of(row, result) for result in results for row in result["variants"] if row["name"] == name]
    return {
        "name": name,
        "kind": kind_of(rows[0]),
        "insert_layer": rows[0]["insert_layer"],
        "mean_insert_layer": mean_of([row.get("mean_insert_layer") for row in rows]),
        "num_layers": rows[0]["num_layers"],
        "scores": scores,
        "average": average(averaged),
        **{key: mean_of([cost[key] for cost in costs]) for key in COSTS},
    }


def columns_of(result: Result, several: bool) -> list[dict[str, Any]]:
    """Return the columns of a result, with scores by variant: its benchmark, or each source of instructions.

    If the table has `several` results, the name of a source's column begins with the run.
    """
    name = result["benchmark"]["name"]
    if name != INSTRUCTIONS:
        scores = {row["name"]: cell(row, row["significance"]) for row in result["variants"]}
        return [{"name": name, "unit": result["variants"][0]["unit"], "scores": scores}]
    columns = []
    for source in result["variants"][0]["per_source"]:
        scores = {}
        for row in result["variants"]:
            figures = row["per_source"][source]
            values = {
                key.replace("accuracy", "score"): in_percent(figures[key])
                for key in ("accuracy", "accuracy_interval", "accuracy_difference_interval")
            }
            scores[row["name"]] = cell(values, figures["significance"])
        label = f"{result['run']} {source}" if several else source
        columns.append({"name": label, "unit": "accuracy", "scores": scores})
    return columns


def cell(values: Mapping[str, Any], significance: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return one score with its interval, and whether it differs significantly from the baseline's."""
    low, high = values["score_difference_interval"]
    p_value = None if significance is None else significance["p_value"]
    excludes_zero = low is not None and high is not None and not low <= 0 <= high
    return {
        "score": values["score"],
        "interval": values["score_interval"],
        "p_value": p_value,
        "significant": bool(excludes_zero if p_value is None else p_value < 0.05),
    }


def in_percent(value: Any) -> Any:
    """Return a share, or a list of shares, in percent."""
    return [100 * share for share in value] if isinstance(value, list) else 100 * value


def costs_of(row: Mapping[str, Any], result: Result) -> dict[str, float]:
    """Return the costs of a variant in one result."""
    ratio = row["kv_cache_bytes"] / result["variants"][0]["kv_cache_bytes"]
    return {"kv_cache_ratio": ratio, **{key: row[key] for key in COSTS if key != "kv_cache_ratio"}}


def kind_of(row: Mapping[str, Any]) -> str:
    """Return the kind of a variant: finetuned, the backbone without finetuning, or with a policy."""
    if "skip_weight" in row:
        return "policy"
    return "without finetuning" if row["path"] is None else "finetuned"


def average(scores: Sequence[Mapping[str, Any] | None]) -> float | None:
    """Return the mean of scores; None if there is none, or one is missing."""
    values = [score["score"] for score in scores if score is not None]
    return float(np.mean(values)) if values and len(values) == len(scores) else None


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    numbers = [value for value in values if value is not None]
    return float(np.mean(numbers)) if numbers else None


def markdown(table: Mapping[str, Any]) -> str:
    """Render `table1` in Markdown, with an explanation of its signs."""
    headings = ["variant", "insert layer"]
    headings += [
        column["name"] + ("" if column["unit"] == "accuracy" else f" ({column['unit']})")
        for column in table["columns"]
    ]
    headings += ["average", "prefill (ms)", "time", "FLOPs", "KV cache"]
    lines = []
    for row in table["rows"]:
        scores = [
            "-" if score is None else f"{score['score']:.1f}{'*' if score['significant'] else ''}"
            for score in row["scores"]
        ]
        mean = "-" if row["average"] is None else f"{row['average']:.1f}"
        ratios = [f"{row[key]:.3f}" for key in ("time_ratio", "flops_ratio", "kv_cache_ratio")]
        lines.append([row["name"], layer_of(row), *scores, mean, f"{row['prefill_ms']:.1f}", *ratios])
    baseline = table["baseline"]
    return (
        f"{markdown_table(headings, lines, '<>')}\n\n"
        f"{table['prompts']} questions; accuracies are in percent. \\*: the score differs from that of "
        f"{baseline} on the same questions (McNemar's exact test, p < 0.05; if answers can be partly right, "
        "the 95 % interval of the difference, clustered by image, excludes 0). Time and KV cache are "
        f"relative to {baseline}; FLOPs are those of the prefill, relative to insert layer 0. Prefill: "
        f"batches of {table['batch_size']}, {describe_machine(table['machine'])}.\n"
    )
