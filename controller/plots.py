"""Pictures of the policy's training and of recommendations, a function each.

Drawn without pyplot, so no display is needed and nothing stays open.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .runs import save_figure

REWARD_COLOURS = {"performance": "tab:blue", "bonus": "tab:orange", "total": "black"}


def policy_rewards(log: str | Path, path: str | Path) -> Path:
    """The paper's Figure 9: reward of the policy in training, in total and by part, over environment steps.

    `log` is the `progress.csv` that train-policy writes, with the columns `time/total_timesteps`,
    `reward/total`, `reward/performance` (-loss) and `reward/bonus` (skip weight x bonus).
    """
    with Path(log).open(encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row.get("reward/total")]
    steps = [float(row["time/total_timesteps"]) for row in rows]
    figure, axes = _figure()
    axes.axhline(0, color="0.6", linewidth=1)
    labels = {"total": "total reward", "performance": "performance (-loss)", "bonus": "skip bonus, weighted"}
    for part, colour in REWARD_COLOURS.items():
        values = [float(row[f"reward/{part}"]) for row in rows]
        axes.plot(steps, values, color=colour, label=labels[part], linewidth=2.5 if part == "total" else 1.5)
    axes.set(
        title="Reward of the layer policy in training",
        xlabel="environment steps (prompts)",
        ylabel="mean reward of a rollout (nats)",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return save_figure(figure, path)


def plot_recommendation(result: Mapping[str, Any], path: str | Path) -> Path:
    """How many prompts of each source got which layer, and the layer recommended for all of them.

    `result` is that of recommend for a data set: `histogram` (counts by source and layer), `insert_layers`,
    `num_layers`, `insert_layer`, `mean_insert_layer` and its `confidence_interval`.
    """
    layers = list(result["insert_layers"])
    figure, axes = _figure()
    below = np.zeros(len(layers))
    for source, counts in result["histogram"].items():
        heights = np.array([counts[str(layer)] for layer in layers])
        axes.bar(layers, heights, bottom=below, label=source, width=0.7)
        below += heights
    for layer, height in zip(layers, below, strict=True):
        if height:
            axes.annotate(f"{height:.0f}", (layer, height), ha="center", va="bottom", fontsize=9)
    mean, (low, high) = result["mean_insert_layer"], result["confidence_interval"]
    axes.axvline(mean, color="black", linewidth=1.2, label=f"mean {mean:.2f} ({low:.2f} to {high:.2f})")
    axes.set(
        title=f"Layers for {below.sum():.0f} prompts; recommended for all: {result['insert_layer']}",
        xlabel=f"insert layer (of {result['num_layers']} decoder layers)",
        ylabel="prompts",
    )
    axes.set_xticks(layers)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    return save_figure(figure, path)


def predicted_ratios(result: Mapping[str, Any], path: str | Path) -> Path:
    """Prefill, decode and KV cache by insert layer as a share of the stock model's, by the roofline model."""
    layers = [row["insert_layer"] for row in result["layers"]]
    figure, axes = _figure()
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


def _figure(width: float = 6.4, height: float = 4.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()
