"""The page of a layer study in Markdown, and its picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from deepinsert.controller.runs.atomic_files import save_figure
from deepinsert.controller.runs.machine import describe_machine
from deepinsert.controller.tables import markdown_table

NAMES = {
    "zero_shot": "before finetuning",
    "finetuned": "finetuned at the layer",
    "random": "one model for all depths",
    "distilled": "the same, distilled",
    "longer": "the same, trained longer",
}
COLOURS = {
    "zero_shot": "0.45",
    "finetuned": "black",
    "random": "tab:blue",
    "distilled": "tab:orange",
    "longer": "tab:red",
}
PREDICTORS = {
    "zero_shot_reward": "frozen model's reward (-loss)",
    "zero_shot_accuracy": "frozen model's accuracy",
    "policy_expectation": "policy's expected reward (-loss)",
}
CHOOSERS = {"zero_shot": "frozen model", "policy": "policy's expectation"}
CHOOSER_COLOURS = {"zero_shot": "0.45", "policy": "tab:green"}

Result = Mapping[str, Any]


def page(result: Result) -> str:
    """Render a study: figures by layer, rank correlations, and the regret of picking a layer early."""
    finetuning = result["finetuning"]
    sections = [
        "# Layer study",
        f"{len(result['insert_layers'])} insert layers of {result['num_layers']} decoder layers. "
        f"Every variant: {finetuning['method']}, {finetuning['steps']} steps of {finetuning['batch_size']} "
        f"of {result['training_prompts']} records, learning rate {finetuning['learning_rate']:g}. All are "
        f"evaluated on {result['prompts']} questions about {result['images']} images on which none was "
        "trained. Intervals are at 95 %, by a bootstrap over images; they do not include the variation "
        f"between training seeds. Machine: {describe_machine(result['machine'])}.",
        "## By insert layer",
        layer_table(result),
        "## Does the frozen model rank the finetuned variants?",
        "The table shows rank correlations over layers between figures known before finetuning and those of "
        "the finetuned variants. The policy's expectation is the mean loss of "
        f"{result['policy_prompts']} training questions.",
        correlation_table(result),
        "## Regret of picking a layer by these figures",
        "The reward is -loss + λ · depth. The regret is the best finetuned reward minus that of the picked "
        "layer. Correlations of rewards at λ > 0 share the bonus, so they are higher than those of losses "
        "alone.",
        choice_table(result),
    ]
    if result["shared"]:
        sections += ["## One model for all depths", shared_sentences(result)]
    return "\n\n".join(sections) + "\n"


def kinds(result: Result) -> list[str]:
    """Return the kinds of models in the study, in the order of `NAMES`."""
    return [kind for kind in NAMES if f"{kind}_loss" in result["by_layer"][0]]


def layer_table(result: Result) -> str:
    """Render loss and accuracy at every layer."""
    models = kinds(result)
    headings = ["insert layer", "FLOPs", "policy's expected loss"]
    headings += [f"{metric}, {NAMES[kind]}" for metric in ("loss", "accuracy") for kind in models]
    rows = []
    for row in result["by_layer"]:
        cells = [str(row["insert_layer"]), f"{row['flops_ratio']:.3f}", f"{row['expected_loss']:.3f}"]
        cells += [f"{row[f'{kind}_loss']['mean']:.3f}" for kind in models]
        cells += [with_interval(row[f"{kind}_accuracy"], percent) for kind in models]
        rows.append(cells)
    return markdown_table(headings, rows)


def correlation_table(result: Result) -> str:
    """Render rank correlations with their intervals."""
    headings = ["known before", "with finetuned", "Spearman", "Kendall"]
    rows = []
    for predictor, name in PREDICTORS.items():
        for truth, figures in result["rank_correlations"][predictor].items():
            label = "reward (-loss)" if truth == "reward" else truth
            cells = [correlation_with_interval(figures, kind) for kind in ("spearman", "kendall")]
            rows.append([name, label, *cells])
    return markdown_table(headings, rows)


def choice_table(result: Result) -> str:
    """Render the layers picked at each skip weight, and their regret."""
    headings = [
        "λ",
        "picked by",
        "layer",
        "best finetuned",
        "regret (nats)",
        "accuracy lost (points)",
        "Spearman",
    ]
    rows = []
    for entry in result["by_skip_weight"]:
        for chooser, name in CHOOSERS.items():
            figures = entry[chooser]
            regret = {"mean": figures["regret"], "interval": figures["regret_interval"]}
            rows.append(
                [
                    f"{entry['skip_weight']:g}",
                    name,
                    str(figures["picked"]),
                    str(figures["best"]),
                    with_interval(regret, nats),
                    with_interval(figures["accuracy_lost"], points),
                    correlation_with_interval(figures["rank_correlation"], "spearman"),
                ]
            )
    return markdown_table(headings, rows)


def shared_sentences(result: Result) -> str:
    """Compare each model for all depths with the separate variants, in sentences."""
    paragraphs = []
    for name, figures in result["shared"].items():
        differences = [
            f"{layer}: {with_interval(difference, points)}"
            for layer, difference in zip(result["insert_layers"], figures["accuracy_difference"], strict=True)
        ]
        paragraphs.append(
            f"{NAMES[name].capitalize()}: its accuracy minus that of the variant finetuned at the layer is, "
            f"in points by layer: {', '.join(differences)}. The mean is "
            f"{with_interval(figures['mean'], points)}, the least {points(figures['least'])}. "
            f"{steps_of(result, name)} steps took {result['finetuning']['seconds'][name]:.0f} s, those of "
            f"the separate variants together {separate_seconds(result):.0f} s."
        )
    return "\n\n".join(paragraphs)


def steps_of(result: Result, name: str) -> int:
    """Return the optimiser steps of a model for all depths."""
    return int(result["finetuning"]["longer" if name == "longer" else "steps"])


def separate_seconds(result: Result) -> float:
    """Return the seconds of the finetunings of all variants at a single layer."""
    seconds = result["finetuning"]["seconds"]
    return float(sum(seconds[f"finetune-{layer}"] for layer in result["insert_layers"]))


def correlation_with_interval(figures: Mapping[str, Any], kind: str) -> str:
    """Format the rank correlation "spearman" or "kendall" with its interval."""
    return with_interval({"mean": figures[kind], "interval": figures[f"{kind}_interval"]}, signed)


def with_interval(figure: Mapping[str, Any], form: Callable[[float], str]) -> str:
    """Format a figure as `0.87 [0.85, 0.89]`; an undefined figure is a hyphen."""
    low, high = figure["interval"]
    if figure["mean"] is None:
        return "-"
    return form(figure["mean"]) if low is None else f"{form(figure['mean'])} [{form(low)}, {form(high)}]"


def percent(share: float) -> str:
    """Format a share in percent."""
    return f"{100 * share:.1f} %"


def points(share: float) -> str:
    """Format a difference of shares in percentage points."""
    return f"{100 * share:+.1f}"


def signed(value: float) -> str:
    """Format a rank correlation with its sign."""
    return f"{value:+.2f}"


def nats(value: float) -> str:
    """Format a loss in nats."""
    return f"{value:.3f}"


def plot(result: Result, path: Path) -> None:
    """Draw loss and accuracy by layer of all models, and the regret of early picking by λ."""
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    loss_axes, accuracy_axes, regret_axes = figure.subplots(1, 3)
    for kind in kinds(result):
        _plot_by_layer(loss_axes, result, kind, "loss")
        _plot_by_layer(accuracy_axes, result, kind, "accuracy")
    loss_axes.plot(
        result["insert_layers"],
        [row["expected_loss"] for row in result["by_layer"]],
        color="tab:green",
        linestyle=":",
        label="policy's expectation",
    )
    loss_axes.set(xlabel="insert layer", ylabel="loss (nats)", yscale="log")
    accuracy_axes.set(xlabel="insert layer", ylabel="accuracy")
    accuracy_axes.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (loss_axes, accuracy_axes):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    _plot_regrets(regret_axes, result)
    handles = loss_axes.get_legend_handles_labels()
    figure.legend(*handles, frameon=False, loc="outside lower center", ncols=5)
    correlation = correlation_with_interval(
        result["rank_correlations"]["zero_shot_reward"]["accuracy"], "spearman"
    )
    figure.suptitle(
        "Spearman correlation over layers of the frozen model's reward with finetuned accuracy: "
        f"{correlation}"
    )
    save_figure(figure, path)


def _plot_by_layer(axes: Axes, result: Result, kind: str, metric: str) -> None:
    """Draw one metric of one kind of model by layer, with its interval."""
    layers = result["insert_layers"]
    figures = [row[f"{kind}_{metric}"] for row in result["by_layer"]]
    low, high = np.array([figure["interval"] for figure in figures], dtype=float).T
    means = [figure["mean"] for figure in figures]
    axes.plot(layers, means, marker="o", markersize=4, color=COLOURS[kind], label=NAMES[kind])
    axes.fill_between(layers, low, high, color=COLOURS[kind], alpha=0.12)


def _plot_regrets(axes: Axes, result: Result) -> None:
    """Draw the regret of both ways to pick a layer early by skip weight, with the picked layers."""
    entries = result["by_skip_weight"]
    places = np.arange(len(entries), dtype=np.float64)
    for number, (chooser, name) in enumerate(CHOOSERS.items()):
        bar_places = places + 0.38 * (number - 0.5)
        _plot_regret_bars(
            axes, bar_places, [entry[chooser] for entry in entries], name, CHOOSER_COLOURS[chooser]
        )
    labels = [f"{entry['skip_weight']:g}\nbest {entry['zero_shot']['best']}" for entry in entries]
    axes.set_xticks(places, labels)
    axes.set(xlabel="skip weight λ, and best finetuned layer", ylabel="regret of the layer picked (nats)")
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, title="picked by (layer above bar)", fontsize=8, title_fontsize=8)


def _plot_regret_bars(
    axes: Axes, places: NDArray[np.float64], choices: Sequence[Mapping[str, Any]], name: str, colour: str
) -> None:
    """Draw the regrets of one way to pick a layer.

    Args:
        axes: the axes.
        places: the position of each bar.
        choices: the picked layer and its regret at each skip weight.
        name: the label in the legend.
        colour: the colour of the bars.
    """
    regrets = np.array([entry["regret"] for entry in choices])
    low, high = np.array([entry["regret_interval"] for entry in choices], dtype=float).T
    spread = np.abs(np.stack([regrets - np.minimum(low, regrets), np.maximum(high, regrets) - regrets]))
    axes.bar(places, regrets, 0.36, color=colour, label=name)
    axes.errorbar(places, regrets, spread, fmt="none", color="black", linewidth=1, capsize=2)
    for place, top, entry in zip(places, np.maximum(high, regrets), choices, strict=True):
        axes.annotate(
            str(entry["picked"]), (place, top), (0, 3), textcoords="offset points", ha="center", fontsize=8
        )
