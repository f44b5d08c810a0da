"""Pictures of an evaluation: scores against time (the paper's Figure 1), accuracy by source, and costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from deepinsert.controller.runs.atomic_files import save_figure
from deepinsert.controller.runs.machine import describe_machine

MOST_NAMES = 4
"""An axis names at most this many columns of Table 1."""


def figure1(table: Mapping[str, Any], path: Path) -> None:
    """Draw the average score of each variant of a Table 1 against its prefill time: the paper's Figure 1.

    Each variant is a labelled point, and variants of one kind are joined in the order of their layers.
    """
    rows = [row for row in table["rows"] if row["average"] is not None]
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, kind in enumerate(dict.fromkeys(row["kind"] for row in rows)):
        rows_of_kind = sorted(
            (row for row in rows if row["kind"] == kind),
            key=lambda row: -1 if row["insert_layer"] is None else row["insert_layer"],
        )
        # Labels of one kind are above its points, those of the next kind below, since equal layers are close.
        _plot_kind(axes, kind, rows_of_kind, label_offset=-14 if number % 2 else 7)
    axes.set(
        xlabel=f"measured prefill of a batch of {table['batch_size']} (ms)",
        ylabel=f"average of {averaged_columns(table)}",
        title="Performance against run time by insert layer",
    )
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    if rows:
        axes.legend(frameon=False, loc="best")
    figure.supxlabel(f"{table['prompts']} questions; {describe_machine(table['machine'])}", fontsize=8)
    save_figure(figure, path, dpi=120)


def _plot_kind(axes: Axes, kind: str, rows: Sequence[Mapping[str, Any]], label_offset: int) -> None:
    """Draw the points of one kind of variants, with labels `label_offset` points above them."""
    times, scores = ([row[key] for row in rows] for key in ("prefill_ms", "average"))
    (line,) = axes.plot(times, scores, "o-", label=kind)
    for row, time_ms, score in zip(rows, times, scores, strict=True):
        layer = row["insert_layer"]
        axes.annotate(
            row["name"] if layer is None else f"L = {layer}",
            (time_ms, score),
            (0, label_offset),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=line.get_color(),
        )


def averaged_columns(table: Mapping[str, Any]) -> str:
    """Describe, for an axis, the columns over which a Table 1 averages."""
    columns = [column for column in table["columns"] if column["averaged"]]
    names = [column["name"] for column in columns]
    units = {column["unit"] for column in columns}
    description = ", ".join(names) if len(names) <= MOST_NAMES else f"{len(names)} columns"
    return f"{description} ({'/'.join(sorted(units))})"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw scores against prefill time, accuracy by source if there are several, and costs."""
    variants = result["variants"]
    sources = list(variants[0]["per_source"])
    by_source = len(sources) > 1 and variants[0]["accuracy"] is not None
    figure = Figure(figsize=(15 if by_source else 10, 4.4), layout="constrained")
    score_axes, *source_axes, cost_axes = figure.subplots(1, 3 if by_source else 2)
    _plot_scores(score_axes, variants)
    figure.legend(loc="outside lower center", ncols=len(variants), frameon=False)
    for axes in source_axes:
        accuracies = [[row["per_source"][name]["accuracy"] for name in sources] for row in variants]
        _plot_bars(axes, sources, accuracies)
        axes.set(title="Accuracy by source", ylim=(0, 1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    _plot_costs(cost_axes, variants)
    figure.suptitle(
        f"{result['prompts']} prompts, 95 % intervals; {describe_machine(result['timing']['machine'])}"
    )
    save_figure(figure, path)


def _plot_scores(axes: Axes, variants: Sequence[Mapping[str, Any]]) -> None:
    """Draw the score of each variant with its interval against the prefill time."""
    for row in variants:
        low, high = (row["score"] if bound is None else bound for bound in row["score_interval"])
        # A percentile interval may exclude the value itself.
        error = [[max(0.0, row["score"] - low)], [max(0.0, high - row["score"])]]
        label = f"{row['name']} (layer {layer_of(row)})"
        axes.errorbar(row["prefill_ms"], row["score"], error, fmt="o", capsize=3, label=label)
    unit = variants[0]["unit"]
    axes.set(xlabel="measured prefill of a batch (ms)", ylabel=unit, title="Performance against time")
    axes.set_xlim(0, 1.1 * max(row["prefill_ms"] for row in variants))
    if unit == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(100, decimals=1))


def _plot_costs(axes: Axes, variants: Sequence[Mapping[str, Any]]) -> None:
    """Draw FLOPs, times and cache size of each variant relative to the baseline."""
    baseline = variants[0]
    shares = [
        [
            row["flops"] / baseline["flops"],
            row["time_ratio"],
            row["decode_time_ratio"],
            row["kv_cache_bytes"] / baseline["kv_cache_bytes"],
        ]
        for row in variants
    ]
    _plot_bars(axes, ["prefill FLOPs", "prefill time", "decode time", "KV cache"], shares)
    axes.axhline(1, color="0.6", linewidth=1)
    axes.set(title=f"Cost against {baseline['name']}")


def layer_of(row: Mapping[str, Any]) -> str:
    """Return a variant's insert layer as text, or the mean of the layers that its policy chose."""
    if row["insert_layer"] is not None:
        return str(row["insert_layer"])
    mean = row["mean_insert_layer"]
    return "mean -" if mean is None else f"mean {mean:.2f}"


def _plot_bars(axes: Axes, names: Sequence[str], heights: Sequence[Sequence[float]]) -> None:
    """Draw a group of bars per name, with one bar per variant in the order of the legend's colours."""
    width = 0.8 / len(heights)
    for index, values in enumerate(heights):
        offset = (index - (len(heights) - 1) / 2) * width
        axes.bar(np.arange(len(names)) + offset, values, width)
    axes.set_xticks(range(len(names)), names)
