"""Pictures of a policy's training and of recommendations.

They are drawn without pyplot, so that no display is needed and no figure stays open.
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
from numpy.typing import NDArray

from deepinsert.controller.runs.atomic_files import save_figure

from .baselines import PAPER_MEAN_DEPTH

PARETO_LABELS = {
    "loss": "loss (nats)",
    "loss_increase": "loss above insert layer 0's (nats)",
    "accuracy": "accuracy",
}
REWARD_COLOURS = {"performance": "tab:blue", "bonus": "tab:orange", "total": "black"}


def plot_policy_rewards(log: str | Path, path: str | Path) -> Path:
    """Draw the policy's reward in training, in total and by part, over environment steps (paper, Figure 9).

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
    """Draw how many prompts of each source chose which layer, and the layer recommended for all of them.

    `result` is that of recommend for a data set. The picture uses its fields `histogram` (counts by source
    and layer), `insert_layers`, `num_layers`, `insert_layer`, `mean_insert_layer`, `mean_interval` and
    `undecided` (the layers not significantly different from the recommended one, or None).
    """
    figure, axes = _figure(7.2, 4.4)
    totals = _stacked_bars(axes, list(result["insert_layers"]), result["histogram"])
    _mark_layers(axes, result)
    axes.set(
        title=f"Layers for {totals.sum():.0f} prompts at skip weight {result['skip_weight']:g}",
        xlabel=f"insert layer (of {result['num_layers']} decoder layers)",
        ylabel="prompts that choose it",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return save_figure(figure, path)


def plot_pareto(result: Mapping[str, Any], path: str | Path) -> Path:
    """Draw loss, and accuracy if it is known, against prefill FLOPs for policy, fixed layers and oracle.

    `result` is that of recommend for a data set; its `pareto` contains the curves of
    `frontier.pareto_curves` and, as `of`, which prompts they are about. If there is no oracle, the picture
    shows losses as increases relative to insert layer 0.
    """
    curves = result["pareto"]
    panels = ["loss_increase" if curves["oracle"] is None else "loss"]
    panels += ["accuracy"] if curves["fixed"][0]["accuracy"] is not None else []
    figure = Figure(figsize=(5.6 * len(panels) + 0.6, 4.6), layout="constrained")
    for axes, metric in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        _pareto_panel(axes, curves, metric, result["insert_layer"], result["skip_weight"])
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = 3 if len(panels) > 1 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    figure.suptitle(f"Loss against compute\n{curves['of']}", fontsize=11)
    return save_figure(figure, path)


def _stacked_bars(
    axes: Axes, layers: list[int], histogram: Mapping[str, Mapping[str, int]]
) -> NDArray[np.float64]:
    """Draw a bar per layer, stacked by source, with its height above it; return the heights (K)."""
    totals = np.zeros(len(layers))
    for index, (source, counts) in enumerate(histogram.items()):
        heights = np.array([counts[str(layer)] for layer in layers])
        axes.bar(layers, heights, bottom=totals, label=source, width=0.7, color=f"C{index % 10}")
        totals += heights
    for layer, total in zip(layers, totals, strict=True):
        if total:
            axes.annotate(
                f"{total:.0f}",
                (layer, total),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
            )
    return totals


def _mark_layers(axes: Axes, result: Mapping[str, Any]) -> None:
    """Mark the policy's mean layer, the paper's, the undecided layers and the recommended one."""
    mean, (low, high) = result["mean_insert_layer"], result["mean_interval"]
    axes.axvline(mean, color="black", linewidth=1.2, label=f"mean {mean:.2f} ({low:.2f} to {high:.2f})")
    paper = PAPER_MEAN_DEPTH * result["num_layers"]
    axes.axvline(
        paper, color="black", linewidth=1, linestyle=":", label=f"the paper's mean depth ({paper:.1f})"
    )
    for index, layer in enumerate(result["undecided"] or []):
        label = "cannot be told apart (95 %)" if index == 0 else None
        axes.axvspan(layer - 0.5, layer + 0.5, color="0.9", zorder=0, linewidth=0, label=label)
    axes.plot(
        [result["insert_layer"]],
        [0],
        marker="^",
        color="crimson",
        markersize=11,
        clip_on=False,
        linestyle="none",
        zorder=5,
        label=f"recommended for all: {result['insert_layer']}",
    )


def _pareto_panel(
    axes: Axes, curves: Mapping[str, Any], metric: str, insert_layer: int, skip_weight: float
) -> None:
    """Draw `metric` of all curves against prefill FLOPs, and mark the recommended layer and skip weight."""
    _pareto_line(
        axes,
        curves["fixed"],
        metric,
        color="0.45",
        marker="o",
        markersize=4,
        linewidth=1.2,
        label="fixed layers (numbered)",
    )
    if curves["oracle"] is not None:
        label = "oracle: each prompt's best layer"
        _pareto_line(
            axes, curves["oracle"], metric, color="tab:green", linestyle="--", linewidth=1.5, label=label
        )
    _pareto_line(
        axes,
        curves["policy"],
        metric,
        color="tab:blue",
        marker="s",
        markersize=4,
        linewidth=1.8,
        label="policy, over its skip weights",
    )
    fixed = {point["insert_layer"]: point for point in curves["fixed"]}
    _number_layers(axes, fixed, metric, insert_layer)
    _mark_point(
        axes,
        fixed[insert_layer],
        metric,
        marker="o",
        markersize=11,
        markerfacecolor="none",
        markeredgecolor="crimson",
        markeredgewidth=1.6,
        label=f"recommended for all: {insert_layer}",
    )
    nearest = min(curves["policy"], key=lambda point: abs(point["skip_weight"] - skip_weight))
    _mark_point(
        axes,
        nearest,
        metric,
        marker="*",
        markersize=14,
        color="tab:blue",
        markeredgecolor="white",
        label=f"policy at skip weight {nearest['skip_weight']:.3g}",
    )
    axes.set(xlabel="prefill FLOPs against insert layer 0", ylabel=PARETO_LABELS[metric])
    axes.margins(x=0.06, y=0.12)
    axes.grid(alpha=0.3)


def _pareto_line(axes: Axes, points: list[dict[str, Any]], metric: str, **style: Any) -> None:
    points = sorted(points, key=lambda point: point["flops_ratio"])
    axes.plot([point["flops_ratio"] for point in points], [point[metric] for point in points], **style)


def _mark_point(axes: Axes, point: Mapping[str, Any], metric: str, **style: Any) -> None:
    axes.plot([point["flops_ratio"]], [point[metric]], linestyle="none", **style)


def _number_layers(
    axes: Axes, fixed: Mapping[int, Mapping[str, Any]], metric: str, insert_layer: int
) -> None:
    """Annotate about twelve points of the `fixed` layers, `insert_layer` among them, with their layer."""
    # Fixed layers are the worst of the three curves, so there is space on their far side.
    above = -1 if metric == "accuracy" else 1
    stride = max(1, -(-len(fixed) // 12))
    layers = set(list(fixed)[::stride])
    layers = {layer for layer in layers if stride == 1 or abs(layer - insert_layer) >= stride}
    for layer, point in fixed.items():
        if layer in layers | {insert_layer}:
            distance = 9 if layer == insert_layer else 6
            axes.annotate(
                str(layer),
                (point["flops_ratio"], point[metric]),
                xytext=(0, distance * above),
                textcoords="offset points",
                ha="center",
                va="bottom" if above > 0 else "top",
                fontsize=8,
                color="0.3",
            )


def _figure(width: float = 6.4, height: float = 4.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()
