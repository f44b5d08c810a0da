"""The result of `evaluate` as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepinsert.controller.runs.machine import describe_machine
from deepinsert.controller.tables import terminal_table

from .evaluation_pictures import layer_of
from .table1 import INSTRUCTIONS

Result = Mapping[str, Any]
Table = list[tuple[str, ...]]
"""The headings, then one line of cells per row."""


def summary(result: Result) -> str:
    """Render scores and costs of each variant, accuracy by source, and the benchmark's details."""
    blocks = [scores(result), costs(result), *sources_and_details(result)]
    tables = [terminal_table(headings, rows, "<>") for headings, *rows in blocks]
    return "\n\n".join([*tables, note(result)])


def scores(result: Result) -> Table:
    """Return the table of scores with intervals and differences from the baseline."""
    unit = result["variants"][0]["unit"]
    percent = "%" if unit == "accuracy" else ""
    table: Table = [("variant", "layer", f"{unit} [95 %]", "difference [95 %]", "p", "loss")]
    for row in result["variants"]:
        significance, difference = row["significance"], "-"
        if row["name"] != result["baseline"]:
            difference = with_interval(row["score_difference"], row["score_difference_interval"], "", "+")
        table.append(
            (
                row["name"],
                f"{layer_of(row)}/{row['num_layers']}",
                with_interval(row["score"], row["score_interval"], percent),
                difference,
                "-" if significance is None else f"{significance['p_value']:.3g}",
                "-" if row["loss"] is None else f"{row['loss']:.3f}",
            )
        )
    return table


def costs(result: Result) -> Table:
    """Return the table of FLOPs, times and memory."""
    table: Table = [
        ("costs", "FLOPs", "prefill", "time", "decode", "questions/s", "tokens/s", "KV cache", "memory")
    ]
    for row in result["variants"]:
        memory = row["peak_memory_bytes"]
        table.append(
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
    return table


def sources_and_details(result: Result) -> list[Table]:
    """Return accuracy by source if there are several, and the other numbers of a published benchmark."""
    variants = result["variants"]
    tables: list[Table] = []
    sources = list(variants[0]["per_source"])
    if len(sources) > 1 and variants[0]["accuracy"] is not None:
        accuracies = [
            (row["name"], *(f"{row['per_source'][name]['accuracy']:.1%}" for name in sources))
            for row in variants
        ]
        tables.append([("accuracy by source", *sources), *accuracies])
    details = list(variants[0]["details"])
    if details and result["benchmark"]["name"] != INSTRUCTIONS and details != sources:
        values = [(name, *(f"{row['details'][name]:.1f}" for row in variants)) for name in details]
        tables.append([("details", *(row["name"] for row in variants)), *values])
    return tables


def note(result: Result) -> str:
    """Return the sentences below the tables."""
    baseline = result["baseline"]
    return (
        f"{result['prompts']} prompts about {result['images']} images. Intervals are clustered by image; p "
        f"is that of McNemar's exact test against {baseline} on the same questions. FLOPs are those of the "
        f"prefill, relative to insert layer 0. Time is that of the prefill, relative to {baseline}.\n"
        f"Prefill, decode (per token) and questions/s (whole answers): batches of "
        f"{result['variants'][0]['batch_size']}, {describe_machine(result['timing']['machine'])}. "
        "Memory is the peak on CUDA and is not measured elsewhere."
    )


def with_interval(value: float, interval: Sequence[float | None], percent: str, sign: str = "") -> str:
    """Format a value with its interval in brackets.

    Args:
        value: the value.
        interval: its bounds; a bound that is None becomes a question mark.
        percent: the unit behind each number.
        sign: "+" writes the sign of positive numbers.
    """
    low, high = ("?" if bound is None else f"{bound:{sign}.1f}{percent}" for bound in interval)
    return f"{value:{sign}.1f}{percent} [{low}, {high}]"
