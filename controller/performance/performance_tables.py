"""Tables of measured cells, for a terminal and for Markdown, with the goals that they meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from deepinsert.controller.runs.machine import describe_machine
from deepinsert.controller.tables import terminal_table

from .goals import verdict

TITLES = {
    "prefill": "Prefill",
    "decode": "Decoding, one new token of `generate`",
    "forward_backward": "Training step: forward and backward",
    "step": "Training step: forward, backward and optimiser",
}
CASES = {
    "train-full": "all weights but the encoder's are trained",
    "train-lora": "LoRA is trained",
    "rows": "one insert layer per row",
    "ragged": "rows of different lengths, padded",
    "mixed": "every other row without an image, padded",
}
HEADINGS = (
    "insert layer",
    "ms",
    "time ratio",
    "quartiles",
    "CPU time",
    "FLOPs",
    "saving kept",
    "CPU",
    "KV cache MB",
    "goal",
)


def describe_cell(cell: Mapping[str, Any], part: str) -> str:
    """Return one line on a measurement: its part and case, the number of tokens, and the model."""
    case = f" ({CASES[cell['case']]})" if cell["case"] in CASES else ""
    size = f"{cell['rows']} x ({cell['text_tokens']} text + {cell['multimodal_tokens']} multimodal) tokens"
    return (
        f"{TITLES[part]}{case}: {size}, model {cell['model']} ({cell['model_size']}), {cell['dtype']}, "
        f"{cell['attention']}, {cell['repeats']} rounds"
    )


def table_rows(cell: Mapping[str, Any], part: str) -> list[tuple[str, ...]]:
    """Return the cells below `HEADINGS` for the stock model and each insert layer."""
    return [_row(cell, part, row) for row in cell["parts"][part]]


def _row(cell: Mapping[str, Any], part: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = row["time_ratio_quartiles"]
    goal = verdict(cell["case"], part, row)
    return (
        _layer(row["insert_layer"]),
        f"{row['ms']:.1f}",
        f"{row['time_ratio']:.3f}",
        f"{low:.3f}-{high:.3f}",
        f"{row['cpu_time_ratio']:.3f}",
        f"{row['ideal_ratio']:.3f}",
        *("" if part == "decode" else _share(row[name]) for name in ("saving_kept", "cpu_saving_kept")),
        _cache(row),
        f"{goal.goal}: {goal.state}" if goal else "",
    )


def _layer(layer: Any) -> str:
    if layer is None:
        return "stock"
    if isinstance(layer, int):
        return str(layer)
    counts = Counter(layer)
    return ", ".join(f"{value} (x{times})" if times > 1 else str(value) for value, times in counts.items())


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _cache(row: Mapping[str, Any]) -> str:
    measured, formula = row.get("kv_cache_bytes"), row.get("kv_cache_bytes_formula")
    if measured is None:
        return ""
    text = f"{measured / 1e6:.2f}"
    if formula is None:
        return text
    return f"{text} = formula" if measured == formula else f"{text}, formula {formula / 1e6:.2f}"


def figures_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table for a terminal with all columns right-aligned but the last."""
    return terminal_table(headings, rows, ">" * (len(headings) - 1) + "<")


def result_text(result: Mapping[str, Any]) -> str:
    """Return a whole result for a terminal: a table per cell, and the goals at the end."""
    blocks = [
        f"{describe_cell(cell, part)}\n{figures_table(HEADINGS, table_rows(cell, part))}"
        for cell in result["cells"]
        for part in cell["parts"]
    ]
    return "\n\n".join([*blocks, goal_summary(result), f"Measured on {describe_setup(result)}."])


def describe_setup(result: Mapping[str, Any]) -> str:
    """Return machine, device and threads in one line."""
    threads = result["machine"]["torch_threads"]
    return f"{describe_machine(result['machine'])}, {result['device']}, {threads} torch threads"


def goal_summary(result: Mapping[str, Any]) -> str:
    """Count the rows that meet and miss each goal, and the caches whose bytes equal the formula's."""
    counts: dict[str, Counter[str]] = {}
    rows_by_part = [
        (cell["case"], part, row)
        for cell in result["cells"]
        for part, rows in cell["parts"].items()
        for row in rows
    ]
    for case, part, row in rows_by_part:
        if goal := verdict(case, part, row):
            name = f"{part.replace('_', ' + ')}: {goal.goal}"
            counts.setdefault(name, Counter())[goal.state] += 1
    caches = [
        row["kv_cache_bytes"] == row["kv_cache_bytes_formula"]
        for _, _, row in rows_by_part
        if row.get("kv_cache_bytes_formula") is not None
    ]
    if caches:
        name = "KV cache: bytes equal the formula"
        counts[name] = Counter({"met": sum(caches), "missed": len(caches) - sum(caches)})
    states = ("met", "within noise", "missed")
    lines = [(goal, *(str(count[state]) for state in states)) for goal, count in counts.items()]
    return figures_table(("Rows by goal", *states), lines).replace("\n", "\n  ")
