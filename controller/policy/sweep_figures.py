"""The figures of a sweep, from its reward table: for `result.json`, for a terminal, and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from deepinsert.controller.runs.atomic_files import save_figure
from deepinsert.controller.statistics import Interval, mean_interval, paired_interval
from deepinsert.envs.rewards.table import RewardTable


@dataclass(frozen=True)
class FigureSelection:
    """A table, the insert layers to report, and whether to report accuracy and agreement beside the loss."""

    table: RewardTable
    insert_layers: tuple[int, ...]
    accuracy: bool
    agreement: bool


def figures(selection: FigureSelection) -> dict[str, Any]:
    """Return the figures of `result.json`: over all prompts and, under `per_source`, over each source."""
    table = selection.table
    sources = np.array(table.sources)
    groups = {str(source): np.flatnonzero(sources == source) for source in np.unique(sources)}
    return {
        **group_figures(selection, np.arange(len(table))),
        "per_source": {source: group_figures(selection, rows) for source, rows in groups.items()},
    }


def group_figures(selection: FigureSelection, rows: NDArray[np.int64]) -> dict[str, Any]:
    """Return the figures of some prompts: counts, and means per insert layer with 95 % intervals.

    Intervals are clustered by image. `loss_difference` is the paired difference from the shallowest layer.
    `agreement` is the share of prompts whose most probable first token is that of layer 0. Figures that are
    not selected are None.
    """
    table = selection.table
    clusters = [table.image_keys[row] for row in rows]
    flops_ratio = table.flops[rows].sum(axis=0) / table.stock_flops[rows].sum()
    shallowest = table.losses[rows, table.insert_layers.index(selection.insert_layers[0])]
    agreement = table.agreement
    by_layer = []
    for layer in selection.insert_layers:
        column = table.insert_layers.index(layer)
        losses = table.losses[rows, column]
        by_layer.append(
            {
                "insert_layer": layer,
                "depth": layer / table.num_layers,
                **interval("loss", mean_interval(losses, clusters)),
                **interval("loss_difference", paired_interval(losses, shallowest, clusters)),
                **share("accuracy", selection.accuracy, table.correct[rows, column], clusters),
                **share("agreement", selection.agreement, agreement[rows, column], clusters),
                "flops_ratio": flops_ratio[column],
            }
        )
    images = {table.image_keys[row] for row in rows if table.sources[row] != "text"}
    return {"prompts": len(rows), "images": len(images), "by_layer": by_layer}


def interval(name: str, estimate: Interval) -> dict[str, Any]:
    """Return a mean and its interval as entries of `result.json`."""
    return {name: estimate.mean, f"{name}_interval": [estimate.low, estimate.high]}


def share(name: str, selected: bool, values: NDArray[np.float64], clusters: list[str]) -> dict[str, Any]:
    """Return the mean of zeros and ones with its interval; None unless it is selected."""
    if not selected:
        return {name: None, f"{name}_interval": None}
    return interval(name, mean_interval(values, clusters))


def summary(result: dict[str, Any]) -> str:
    """Format the result as a short table for a terminal."""
    shares = ["accuracy", *(["agreement"] if result["by_layer"][0]["agreement"] is not None else [])]
    heads = "".join(f"  {name:^24}" for name in shares)
    lines = [
        f"{result['prompts']} prompts, {result['images']} images, untouched backbone; 95 % intervals",
        f"{'insert layer':>12}  {'loss (nats)':^24}{heads}  {'FLOPs':>6}",
    ]
    for row in result["by_layer"]:
        low, high = row["loss_interval"]
        cells = [f"{row['loss']:.3f} [{low:.3f}, {high:.3f}]"]
        for name in shares:
            mean, bounds = row[name], row[f"{name}_interval"]
            cells.append("-" if mean is None else "{:.1%} [{:.1%}, {:.1%}]".format(mean, *bounds))
        centred = "".join(f"  {cell:^24}" for cell in cells)
        lines.append(f"{row['insert_layer']:>12}{centred}  {row['flops_ratio']:>6.3f}")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot loss, accuracy and agreement by insert layer: a line per source, and one for all prompts.

    Figures that the result does not contain have no panel.
    """
    groups = {"all": result, **(result["per_source"] if len(result["per_source"]) > 1 else {})}
    labels = {"loss": "loss (nats)", "accuracy": "accuracy", "agreement": "first token as at layer 0"}
    metrics = {name: label for name, label in labels.items() if result["by_layer"][0][name] is not None}
    figure = Figure(figsize=(6.4 * len(metrics), 4.2), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(metrics)))
    for axes, (metric, label) in zip(panels, metrics.items(), strict=True):
        for name, group in groups.items():
            values = [row[metric] for row in group["by_layer"]]
            low, high = np.array([row[f"{metric}_interval"] for row in group["by_layer"]]).T
            style = {"color": "black", "linewidth": 2.5} if name == "all" else {}
            (line,) = axes.plot(
                result["insert_layers"], values, marker="o", markersize=4, label=name, **style
            )
            axes.fill_between(result["insert_layers"], low, high, color=line.get_color(), alpha=0.12)
        axes.set(xlabel="insert layer", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    for axes in panels[1:]:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(-0.02, 1.02)
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside right center")
    figure.suptitle(
        f"Untouched backbone of {result['num_layers']} layers; {result['prompts']} prompts, 95 % intervals"
    )
    save_figure(figure, path)
