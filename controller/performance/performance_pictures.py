"""Pictures of measured times: the paper's Figure 12, and what share of the saving each cell keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deepinsert.controller.runs.folder import describe_machine, save_figure

from .goals import PREFILL_KEPT

PAPER_KEPT = (0.49, 0.64)
"""What the paper's own code keeps of the saving that eq. (5) allows, by its Figure 12 and table of times."""

COLOURS = {
    "prefill": "tab:blue",
    "forward_backward": "tab:orange",
    "step": "tab:brown",
    "rows": "tab:green",
    "ragged": "tab:purple",
    "mixed": "tab:pink",
}


def figure12(cell: Mapping[str, Any], path: str | Path) -> Path:
    """The paper's Figure 12: prefill time by insert layer and eq. (5) on one axis, as shares of stock.

    The exact FLOPs of the whole model stand beside eq. (5), which counts the decoder layers alone.
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
    cpu = [row["cpu_time_ratio"] for row in rows]
    if cell["device"] == "cpu":
        axes.plot(layers, cpu, "x", color="tab:cyan", label="CPU time")
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


def saving_kept(cells: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Share of the possible saving kept, a line for each cell and a mark for each insert layer."""
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
    for place, (cell, part, rows) in enumerate(lines):
        colour = COLOURS.get(cell["case"], COLOURS.get(part, "black"))
        on_cpu = cell["device"] == "cpu"
        if on_cpu:
            axes.plot([row["cpu_saving_kept"] for row in rows], [place] * len(rows), "x", color=colour)
        axes.plot(
            [row["saving_kept"] for row in rows], [place] * len(rows), "o", color=colour, fillstyle="none"
        )
    axes.plot([], [], "o", color="0.3", fillstyle="none", label="wall clock, one mark a layer")
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
    case = cell["case"] if cell["case"] in ("prefill", "rows", "ragged", "mixed") else part
    kind = {"train-full": ", full", "train-lora": ", LoRA"}.get(cell["case"], "")
    size = f"{cell['rows']} x ({cell['text_tokens']} + {cell['multimodal_tokens']})"
    return f"{case.replace('_', ' + ')}{kind}, {size}, {cell['model']}"


def predicted_ratios(result: Mapping[str, Any], path: str | Path) -> Path:
    """Prefill, decode and KV cache by insert layer as a share of the stock model's, by the roofline model."""
    layers = [row["insert_layer"] for row in result["layers"]]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="0.6", linewidth=1)
    lines = {
        "prefill_ratio": f"prefill time ({result['stock']['prefill']['ms']:.3g} ms)",
        "decode_ratio": f"decode time of a token ({result['stock']['decode']['ms']:.3g} ms)",
        "kv_cache_ratio": f"KV cache ({result['stock']['kv_cache_bytes'] / 1e6:.4g} MB)",
        "flops_ratio": "FLOPs of the prefill",
    }
    for name, label in lines.items():
        ratios = [row[name] for row in result["layers"]]
        axes.plot(layers, ratios, marker="o", markersize=4, label=label, ls="--" if "flops" in name else "-")
    axes.set(
        title=f"Expected of {result['device']['name']}: {result['rows']} x ({result['text_tokens']} text + "
        f"{result['multimodal_tokens']} multimodal) tokens",
        ylabel="against the stock model",
    )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("insert layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, title="stock model in brackets")
    return save_figure(figure, path)
