"""Results of `evaluate` as tables: for a terminal, and one or several as the paper's Table 1.

`deepinsert report` joins evaluations of the same variants on several benchmarks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deepinsert.controller.options import ReportOptions
from deepinsert.controller.runs.atomic_files import atomic_file, write_json
from deepinsert.controller.runs.command import run_command
from deepinsert.controller.runs.folder import read_config, read_result
from deepinsert.controller.runs.machine import describe_machine

from .evaluation_pictures import figure1, layer_of
from .variants import variant_names

INSTRUCTIONS = "instructions"
NOT_AVERAGED = {"perception score", "CIDEr"}
"""Units that are no percentage, MME's and COCO's: the paper's averages leave MME's out too."""
COSTS = ("prefill_ms", "time_ratio", "decode_time_ratio", "flops_ratio", "kv_cache_ratio")
Result = Mapping[str, Any]


def run(options: ReportOptions) -> dict[str, Any]:
    """Write `table1.md`, `table1.json`, `figure1.png` and `result.json` of several evaluations; return the
    last.

    Raises `ValueError` for a folder that is not of a finished evaluate, and for evaluations whose variants
    have nothing in common.
    """

    def summary(result: dict[str, Any]) -> str:
        return (Path(options.out) / "table1.md").read_text("utf-8")

    return run_command(options, partial(join, options), summary, reuse=False)


def join(options: ReportOptions, out: Path) -> dict[str, Any]:
    """Read the evaluations, write their common Table 1 and Figure 1, and return the table."""
    results = []
    for name, folder in zip(variant_names(options.runs, "--runs"), options.runs, strict=True):
        config = read_config(folder)
        if config is None or config["command"] != "evaluate" or not (folder / "result.json").is_file():
            raise ValueError(f"--runs {folder}: not the folder of a finished evaluate")
        results.append(read_result(folder) | {"run": name})
    return write_table1(results, out)


def write_table1(results: Sequence[Result], out: Path) -> dict[str, Any]:
    """Write `table1.md`, `table1.json` and `figure1.png` of one or several results; return the table."""
    found = table1(results)
    write_json(out / "table1.json", found)
    with atomic_file(out / "table1.md") as temporary:
        temporary.write_text(markdown(found), "utf-8")
    figure1(found, out / "figure1.png")
    return found


def table1(results: Sequence[Result]) -> dict[str, Any]:
    """The paper's Table 1: a row for each variant, a column for each benchmark, or source of instructions,
    their average, and what the variant costs.

    Scores are in the benchmark's unit, accuracies in percent. The average is over the columns in percent (a
    single column is its own average), None for a variant that lacks one; costs are means over the results,
    ratios against the baseline. A p-value is McNemar's; `significant` says whether it is below 0.05 or, where
    there is none, whether the 95 % interval of the difference leaves out 0.

    Raises `ValueError` where results have another baseline, or a name stands for other insert layers.
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
    names = list(dict.fromkeys(row["name"] for result in results for row in result["variants"]))
    rows = []
    for name in names:
        own = [row for result in results for row in result["variants"] if row["name"] == name]
        layers = {row["insert_layer"] for row in own}
        if len(layers) > 1:
            raise ValueError(f"variant {name!r} has insert layers {sorted(map(str, layers))}: rename one")
        scores = [column["scores"].get(name) for column in columns]
        averaged = [score for score, column in zip(scores, columns, strict=True) if column["averaged"]]
        costs = [cost(row, result) for result in results for row in result["variants"] if row["name"] == name]
        rows.append(
            {
                "name": name,
                "kind": kind_of(own[0]),
                "insert_layer": own[0]["insert_layer"],
                "mean_insert_layer": mean_of([row.get("mean_insert_layer") for row in own]),
                "num_layers": own[0]["num_layers"],
                "scores": scores,
                "average": average(averaged),
                **{key: mean_of([each[key] for each in costs]) for key in COSTS},
            }
        )
    return {
        "columns": [{name: column[name] for name in ("name", "unit", "averaged")} for column in columns],
        "rows": rows,
        "baseline": baselines[0],
        "prompts": sum(result["prompts"] for result in results),
        "machine": results[0]["timing"]["machine"],
        "batch_size": results[0]["variants"][0]["batch_size"],
    }


def columns_of(result: Result, joined: bool) -> list[dict[str, Any]]:
    """Columns that a result fills: its benchmark, or each source of instructions, with scores by variant.

    Where several results are joined, a column of instructions says which run it is of.
    """
    name = result["benchmark"]["name"]
    if name != INSTRUCTIONS:
        scores = {row["name"]: cell(row, row["significance"]) for row in result["variants"]}
        return [{"name": name, "unit": result["variants"][0]["unit"], "scores": scores}]
    found = []
    for source in result["variants"][0]["per_source"]:
        scores = {}
        for row in result["variants"]:
            part = row["per_source"][source]
            values = {
                key.replace("accuracy", "score"): times100(part[key])
                for key in ("accuracy", "accuracy_interval", "accuracy_difference_interval")
            }
            scores[row["name"]] = cell(values, part["significance"])
        label = f"{result['run']} {source}" if joined else source
        found.append({"name": label, "unit": "accuracy", "scores": scores})
    return found


def cell(values: Mapping[str, Any], significance: Mapping[str, Any] | None) -> dict[str, Any]:
    """One score of Table 1, with its interval, and whether it differs significantly from the baseline's."""
    low, high = values["score_difference_interval"]
    p_value = None if significance is None else significance["p_value"]
    known = low is not None and high is not None
    apart = known and not low <= 0 <= high if p_value is None else p_value < 0.05
    return {
        "score": values["score"],
        "interval": values["score_interval"],
        "p_value": p_value,
        "significant": bool(apart),
    }


def times100(value: Any) -> Any:
    """A share, or a list of shares, in percent."""
    return [100 * each for each in value] if isinstance(value, list) else 100 * value


def cost(row: Mapping[str, Any], result: Result) -> dict[str, float]:
    """What a variant costs in one result."""
    ratio = row["kv_cache_bytes"] / result["variants"][0]["kv_cache_bytes"]
    return {"kv_cache_ratio": ratio, **{key: row[key] for key in COSTS if key != "kv_cache_ratio"}}


def kind_of(row: Mapping[str, Any]) -> str:
    """How a variant came about: finetuned, the backbone at a fixed layer without that, or with a policy."""
    if "skip_weight" in row:
        return "policy"
    return "without finetuning" if row["path"] is None else "finetuned"


def average(scores: Sequence[Mapping[str, Any] | None]) -> float | None:
    """The mean of scores; None where there is none, or one is missing."""
    known = [score["score"] for score in scores if score is not None]
    return float(np.mean(known)) if known and len(known) == len(scores) else None


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def markdown(found: Mapping[str, Any]) -> str:
    """`table1` in Markdown, with what its signs mean."""
    heads = ["variant", "insert layer"]
    heads += [
        column["name"] + ("" if column["unit"] == "accuracy" else f" ({column['unit']})")
        for column in found["columns"]
    ]
    heads += ["average", "prefill (ms)", "time", "FLOPs", "KV cache"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for row in found["rows"]:
        scores = [
            "-" if score is None else f"{score['score']:.1f}{'*' if score['significant'] else ''}"
            for score in row["scores"]
        ]
        average = "-" if row["average"] is None else f"{row['average']:.1f}"
        costs = [f"{row['prefill_ms']:.1f}"]
        costs += [f"{row[key]:.3f}" for key in ("time_ratio", "flops_ratio", "kv_cache_ratio")]
        lines.append([row["name"], layer_of(row), *scores, average, *costs])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"{text}\n\n"
        f"{found['prompts']} questions; accuracies in percent. \\*: differs from {found['baseline']} on the "
        "same questions (McNemar's exact test, p < 0.05; where answers earn more than wrong or right, the "
        f"95 % interval of the difference, clustered by image, leaves out 0). Time and KV cache: against "
        f"{found['baseline']}; FLOPs: of the prefill against insert layer 0. Prefill: batches of "
        f"{found['batch_size']}, {describe_machine(found['machine'])}.\n"
    )


def table(result: Result) -> str:
    """The result for a terminal: scores and costs of each variant, then accuracy by source."""
    variants = result["variants"]
    unit = variants[0]["unit"]
    percent = "%" if unit == "accuracy" else ""
    scores: list[tuple[str, ...]] = [("variant", "layer", f"{unit} [95 %]", "difference [95 %]", "p", "loss")]
    costs: list[tuple[str, ...]] = [
        ("costs", "FLOPs", "prefill", "time", "decode", "questions/s", "tokens/s", "KV cache", "memory")
    ]
    for row in variants:
        significance, memory = row["significance"], row["peak_memory_bytes"]
        first = row["name"] == result["baseline"]
        scores.append(
            (
                row["name"],
                f"{layer_of(row)}/{row['num_layers']}",
                with_interval(row["score"], row["score_interval"], percent),
                "-"
                if first
                else with_interval(row["score_difference"], row["score_difference_interval"], "", "+"),
                "-" if significance is None else f"{significance['p_value']:.3g}",
                "-" if row["loss"] is None else f"{row['loss']:.3f}",
            )
        )
        costs.append(
            (
                row["name"],
                f"{row['flops_ratio']:.3f}",
                f"{row['prefill_ms']:.1f} ms",
                f"{row['time_ratio']:.3f}",
                f"{row['decode_ms']:.2f} ms",
                f"{row['questions_per_second']:.1f}",
                f"{row['tokens_per_second']:.1f}",
                f"{row['kv_cache_bytes'] / 1000:,.1f} kB",
                "n/a" if memory is None else f"{memory / 1e9:.2f} GB",
            )
        )
    note = (
        f"{result['prompts']} prompts about {result['images']} images. Intervals are clustered by image; p: "
        f"McNemar's exact test against {result['baseline']} on the same questions. FLOPs: prefill against "
        f"insert layer 0. Time: prefill against {result['baseline']}.\n"
        f"Prefill, decode (per token) and questions/s (whole answers): batches of "
        f"{variants[0]['batch_size']}, {describe_machine(result['timing']['machine'])}. "
        "Memory: peak on CUDA, not measured elsewhere."
    )
    blocks = [scores, costs, *parts(result)]
    return "\n\n".join(["\n".join(columns(block)) for block in blocks] + [note])


def parts(result: Result) -> list[list[tuple[str, ...]]]:
    """Blocks of the table: accuracy by source where there are several, and what else a benchmark says."""
    variants, blocks = result["variants"], []
    sources = list(variants[0]["per_source"])
    if len(sources) > 1 and variants[0]["accuracy"] is not None:
        accuracies = [
            (row["name"], *(f"{row['per_source'][name]['accuracy']:.1%}" for name in sources))
            for row in variants
        ]
        blocks.append([("accuracy by source", *sources), *accuracies])
    details = list(variants[0]["details"])
    if details and result["benchmark"]["name"] != INSTRUCTIONS and details != sources:
        names = [(name, *(f"{row['details'][name]:.1f}" for row in variants)) for name in details]
        blocks.append([("details", *(row["name"] for row in variants)), *names])
    return blocks


def with_interval(value: float, interval: Sequence[float | None], percent: str, sign: str = "") -> str:
    """A value with its interval in brackets; a bound that is None is written as a question mark."""
    low, high = ("?" if each is None else f"{each:{sign}.1f}{percent}" for each in interval)
    return f"{value:{sign}.1f}{percent} [{low}, {high}]"


def columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells as text, the first column to the left and the others to the right."""
    widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
