"""Pictures of measured and predicted times: the paper's Figure 12, kept savings, and predicted ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deepinsert.controller.runs.atomic_files import save_figure
from deepinsert.controller.runs.machine import describe_machine

from .goals import PREFILL_KEPT

PAPER_KEPT = (0.49, 0.64)
"""Shares of eq. (5)'s saving that the paper's own code keeps, by its Figure 12 and its table of times."""

COLOURS = {
    "prefill": "tab:blue",
    "forward_backward": "tab:orange",
    "step": "tab:brown",
    "rows": "tab:green",
    "ragged": "tab:purple",
    "mixed": "tab:pink",
}


def draw_figure12(cell: Mapping[str, Any], path: str | Path) -> Path:
    """Draw the paper's Figure 12: prefill time by insert layer and eq. (5) on one axis, as shares of stock.

    The exact FLOPs of the whole model are drawn beside eq. (5), which counts the decoder layers alone.
    """
    rows = [row for row in cell["parts"]["prefill"] if row["insert_layer"] is not None]
    stock = next(row for row in cell["parts"]["prefill"] if row["insert_layer"] is None)
    layers = [row["insert_layer"] for row in rows]
    ratios = np.array([row["time_ratio"] for row in rows])
    low, high = np.array([row["time_ratio_quartiles"] for row in rows]).T
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="0.6", linewidth=1, label=f"stock model, {stock['ms']:.0f} ms")
    axes.plot(layers, [row["eq5_ratio"] for row in rows], ":", color="tab:red", label="eq. (5)")
    axes.plot(
        layers, [row["ideal_ratio"] for row in rows], "--", color="0.3", label="FLOPs of the whole model"
    )
    errors = [np.maximum(ratios - low, 0), np.maximum(high - ratios, 0)]
    axes.errorbar(layers, ratios, errors, fmt="o", capsize=3, color="tab:blue", label="time (quartiles)")
    cpu_ratios = [row["cpu_time_ratio"] for row in rows]
    if cell["device"] == "cpu":
        axes.plot(layers, cpu_ratios, "x", color="tab:cyan", label="CPU time")
    axes.set(
        title=f"Prefill of {cell['rows']} x ({cell['text_tokens']} text + {cell['multimodal_tokens']} "
        f"multimodal) tokens\n{cell['model']}, {describe_machine(cell['machine'])}",
        xlabel=f"insert layer (of {cell['num_layers']} decoder layers)",
        ylabel="share of the stock model",
    )
    axes.title.set_fontsize(10)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return save_figure(figure, path)


def draw_saving_kept(cells: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw the share of the possible saving that was kept: one line per cell, one mark per insert layer."""
    lines = [
        (cell, part, [row for row in rows if row["saving_kept"] is not None])
        for cell in cells
        for part, rows in cell["parts"].items()
        if part != "decode"
    ]
    lines = [line for line in lines if line[2]]
    figure = Figure(figsize=(8.6, 1.6 + 0.3 * len(lines)), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(*PAPER_KEPT, color="0.88", label="the paper's code (A100)")
    axes.axvline(PREFILL_KEPT, color="0.5", linestyle="--", linewidth=1, label="goal for prefill, 95 %")
    axes.axvline(1, color="0.2", linewidth=1, label="all that the FLOPs allow")
    for height, (cell, part, rows) in enumerate(lines):
        colour = COLOURS.get(cell["case"], COLOURS.get(part, "black"))
        heights = [height] * len(rows)
        if cell["device"] == "cpu":
            axes.plot([row["cpu_saving_kept"] for row in rows], heights, "x", color=colour)
        axes.plot([row["saving_kept"] for row in rows], heights, "o", color=colour, fillstyle="none")
    axes.plot([], [], "o", color="0.3", fillstyle="none", label="wall clock, one mark per layer")
    axes.plot([], [], "x", color="0.3", label="CPU time")
    axes.set_yticks(range(len(lines)), [_label(cell, part) for cell, part, _ in lines], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("share kept of the saving that the FLOPs allow")
    axes.grid(alpha=0.3, axis="x")
    figure.suptitle(describe_machine(cells[0]["machine"]) if cells else "", fontsize=9)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return save_figure(figure, path)


def _label(cell: Mapping[str, Any], part: str) -> str:
    """Return the name of a cell's part on the axis: case, size and model."""
    case = cell["case"] if cell["case"] in ("prefill", "rows", "ragged", "mixed") else part
    kind = {"train-full": ", full", "train-lora": ", LoRA"}.get(cell["case"], "")
    size = f"{cell['rows']} x ({cell['text_tokens']} + {cell['multimodal_tokens']})"
    return f"{case.replace('_', ' + ')}{kind}, {size}, {cell['model']}"


def draw_predicted_ratios(result: Mapping[str, Any], path: str | Path) -> Path:
    """Draw predicted prefill, decode and KV cache by insert layer, as shares of the stock model's."""
    layers = [row["insert_layer"] for row in result["layers"]]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="0.6", linewidth=1)
    lines = {
        "prefill_ratio": f"prefill time ({result['stock']['prefill']['ms']:.3g} ms)",
        "decode_ratio": f"decode time per token ({result['stock']['decode']['ms']:.3g} ms)",
        "kv_cache_ratio": f"KV cache ({result['stock']['kv_cache_bytes'] / 1e6:.4g} MB)",
        "flops_ratio": "FLOPs of the prefill",
    }
    for name, label in lines.items():
        ratios = [row[name] for row in result["layers"]]
        axes.plot(layers, ratios, marker="o", markersize=4, label=label, ls="--" if "flops" in name else "-")
    axes.set(
        title=f"Predicted for {result['device']['name']}: {result['rows']} x ({result['text_tokens']} text + "
        f"{result['multimodal_tokens']} multimodal) tokens",
        ylabel="share of the stock model",
    )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("insert layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, title="stock model in brackets")
    return save_figure(figure, path)
