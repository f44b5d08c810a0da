"""Pictures of an evaluation: performance against time (the paper's Figure 1), by source, and costs."""

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


def figure1(found: Mapping[str, Any], path: Path) -> None:
    """Average performance of each variant of a Table 1 against its measured prefill time, the paper's
    Figure 1: a labelled point each, variants of one kind joined along their layers."""
    rows = [row for row in found["rows"] if row["average"] is not None]
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, kind in enumerate(dict.fromkeys(row["kind"] for row in rows)):
        own = sorted(
            (row for row in rows if row["kind"] == kind),
            key=lambda row: -1 if row["insert_layer"] is None else row["insert_layer"],
        )
        times, scores = ([row[key] for row in own] for key in ("prefill_ms", "average"))
        (line,) = axes.plot(times, scores, "o-", label=kind)
        # One kind's labels above its points, the next one's below: equal layers lie close together.
        above = -14 if number % 2 else 7
        for row, *point in zip(own, times, scores, strict=True):
            layer = row["insert_layer"]
            axes.annotate(
                row["name"] if layer is None else f"L = {layer}",
                (point[0], point[1]),
                (0, above),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=line.get_color(),
            )
    axes.set(
        xlabel=f"measured prefill of a batch of {found['batch_size']} (ms)",
        ylabel=f"average of {averaged(found)}",
        title="Performance against run time by insert layer",
    )
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    if rows:
        axes.legend(frameon=False, loc="best")
    figure.supxlabel(f"{found['prompts']} questions; {describe_machine(found['machine'])}", fontsize=8)
    save_figure(figure, path, dpi=120)


def averaged(found: Mapping[str, Any]) -> str:
    """What the average of a Table 1 is taken of, for an axis."""
    columns = [column for column in found["columns"] if column["averaged"]]
    names = [column["name"] for column in columns]
    units = {column["unit"] for column in columns}
    what = ", ".join(names) if len(names) <= 4 else f"{len(names)} columns"
    return f"{what} ({'/'.join(sorted(units))})"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """The score against prefill time, accuracy by source where there are several, and costs."""
    variants = result["variants"]
    names = list(variants[0]["per_source"])
    by_source = len(names) > 1 and variants[0]["accuracy"] is not None
    figure = Figure(figsize=(15 if by_source else 10, 4.4), layout="constrained")
    scatter, *sources, costs = figure.subplots(1, 3 if by_source else 2)
    for row in variants:
        low, high = (row["score"] if each is None else each for each in row["score_interval"])
        # A percentile interval need not hold the value itself.
        error = [[max(0.0, row["score"] - low)], [max(0.0, high - row["score"])]]
        label = f"{row['name']} (layer {layer_of(row)})"
        scatter.errorbar(row["prefill_ms"], row["score"], error, fmt="o", capsize=3, label=label)
    unit = variants[0]["unit"]
    scatter.set(xlabel="measured prefill of a batch (ms)", ylabel=unit, title="Performance against time")
    scatter.set_xlim(0, 1.1 * max(row["prefill_ms"] for row in variants))
    if unit == "accuracy":
        scatter.yaxis.set_major_formatter(PercentFormatter(100, decimals=1))
    figure.legend(loc="outside lower center", ncols=len(variants), frameon=False)
    for axes in sources:
        bars(axes, names, [[row["per_source"][name]["accuracy"] for name in names] for row in variants])
        axes.set(title="Accuracy by source", ylim=(0, 1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    first = variants[0]
    shares = [
        [
            row["flops"] / first["flops"],
            row["time_ratio"],
            row["decode_time_ratio"],
            row["kv_cache_bytes"] / first["kv_cache_bytes"],
        ]
        for row in variants
    ]
    bars(costs, ["prefill FLOPs", "prefill time", "decode time", "KV cache"], shares)
    costs.axhline(1, color="0.6", linewidth=1)
    costs.set(title=f"Cost against {first['name']}")
    figure.suptitle(
        f"{result['prompts']} prompts, 95 % intervals; {describe_machine(result['timing']['machine'])}"
    )
    save_figure(figure, path)


def layer_of(row: Mapping[str, Any]) -> str:
    """A variant's insert layer, or the mean of those that its policy chose."""
    if row["insert_layer"] is not None:
        return str(row["insert_layer"])
    mean = row["mean_insert_layer"]
    return "mean -" if mean is None else f"mean {mean:.2f}"


def bars(axes: Axes, names: Sequence[str], heights: Sequence[Sequence[float]]) -> None:
    """A group of bars at each name, one for each variant, in the order of the legend's colours."""
    width = 0.8 / len(heights)
    for index, values in enumerate(heights):
        offset = (index - (len(heights) - 1) / 2) * width
        axes.bar(np.arange(len(names)) + offset, values, width)
    axes.set_xticks(range(len(names)), names)
