"""Cells as tables, for a terminal and for Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from deepinsert.controller.runs.folder import describe_machine

from .goals import verdict

TITLES = {
    "prefill": "Prefill",
    "decode": "Decoding, one new token of `generate`",
    "forward_backward": "Training step: forward and backward",
    "step": "Training step: forward, backward and optimiser",
}
CASES = {
    "train-full": "all weights but the encoder's learn",
    "train-lora": "LoRA learns",
    "rows": "one insert layer for each row",
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
    """One line: what was measured, on which model, on how many tokens."""
    case = f" ({CASES[cell['case']]})" if cell["case"] in CASES else ""
    size = f"{cell['rows']} x ({cell['text_tokens']} text + {cell['multimodal_tokens']} multimodal) tokens"
    return (
        f"{TITLES[part]}{case}: {size}, model {cell['model']} ({cell['model_size']}), {cell['dtype']}, "
        f"{cell['attention']}, {cell['repeats']} rounds"
    )


def table_rows(cell: Mapping[str, Any], part: str) -> list[tuple[str, ...]]:
    """The texts of `HEADINGS` for the stock model and each insert layer."""
    return [_row(cell, part, row) for row in cell["parts"][part]]


def _row(cell: Mapping[str, Any], part: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = row["time_ratio_quartiles"]
    judged = verdict(cell["case"], part, row)
    return (
        _layer(row["insert_layer"]),
        f"{row['ms']:.1f}",
        f"{row['time_ratio']:.3f}",
        f"{low:.3f}-{high:.3f}",
        f"{row['cpu_time_ratio']:.3f}",
        f"{row['ideal_ratio']:.3f}",
        *("" if part == "decode" else _share(row[name]) for name in ("saving_kept", "cpu_saving_kept")),
        _cache(row),
        f"{judged.goal}: {judged.state}" if judged else "",
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


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns for a terminal, right-aligned but the last."""
    widths = [max(len(line[column]) for line in [headings, *rows]) for column in range(len(headings))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == len(widths) - 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [headings, *rows]
    )


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same for Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def terminal(result: Mapping[str, Any]) -> str:
    """A whole result for a terminal: a table for each cell, and the goals at the end."""
    blocks = [
        f"{describe_cell(cell, part)}\n{text_table(HEADINGS, table_rows(cell, part))}"
        for cell in result["cells"]
        for part in cell["parts"]
    ]
    return "\n\n".join([*blocks, summary(result), f"Measured on {measured_on(result)}."])


def measured_on(result: Mapping[str, Any]) -> str:
    """Machine, device and threads in one line."""
    threads = result["machine"]["torch_threads"]
    return f"{describe_machine(result['machine'])}, {result['device']}, {threads} torch threads"


def summary(result: Mapping[str, Any]) -> str:
    """How many rows stand how to each goal, and whether the cache's bytes are the formula's."""
    counts: dict[str, Counter[str]] = {}
    for cell in result["cells"]:
        for part, rows in cell["parts"].items():
            for row in rows:
                judged = verdict(cell["case"], part, row)
                if judged:
                    name = f"{part.replace('_', ' + ')}: {judged.goal}"
                    counts.setdefault(name, Counter())[judged.state] += 1
    caches = [
        row["kv_cache_bytes"] == row["kv_cache_bytes_formula"]
        for cell in result["cells"]
        for rows in cell["parts"].values()
        for row in rows
        if row.get("kv_cache_bytes_formula") is not None
    ]
    if caches:
        name = "KV cache: bytes equal the formula"
        counts[name] = Counter({"met": sum(caches), "missed": len(caches) - sum(caches)})
    states = ("met", "within noise", "missed")
    rows = [(goal, *(str(count[state]) for state in states)) for goal, count in counts.items()]
    return text_table(("Rows by goal", *states), rows).replace("\n", "\n  ")
