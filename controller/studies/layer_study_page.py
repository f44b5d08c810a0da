"""What a layer study shows: its tables as Markdown, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from deepinsert.controller.runs.atomic_files import save_figure
from deepinsert.controller.runs.machine import describe_machine

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


def page(result: dict[str, Any]) -> str:
    """The study as Markdown: figures by layer, rank correlations, and what picking a layer early loses."""
    finetuning = result["finetuning"]
    sections = [
        "# Layer study",
        f"{len(result['insert_layers'])} insert layers of {result['num_layers']} decoder layers. "
        f"Every variant: {finetuning['method']}, {finetuning['steps']} steps of {finetuning['batch_size']} "
        f"of {result['training_prompts']} records, learning rate {finetuning['learning_rate']:g}. Judged on "
        f"{result['prompts']} questions about {result['images']} images that none was trained on. Intervals "
        "are at 95 %, by a bootstrap over images: they do not hold what another training seed would change. "
        f"Machine: {describe_machine(result['machine'])}.",
        "## By insert layer",
        by_layer(result),
        "## Does the frozen model rank the finetuned variants?",
        "Rank correlation over layers of what is known before finetuning with what finetuned variants reach. "
        f"The policy's expectation is the mean loss of {result['policy_prompts']} training questions.",
        correlation_table(result),
        "## What picking by it loses",
        "Reward: -loss + λ · depth. Regret: the best finetuned reward minus that at the picked layer. "
        "Correlations of rewards at λ > 0 share the bonus, so they are higher than those of losses alone.",
        choice_table(result),
    ]
    if result["shared"]:
        sections += ["## One model for all depths", shared_sentences(result)]
    return "\n\n".join(sections) + "\n"


def kinds(result: dict[str, Any]) -> list[str]:
    """What was judged at every layer, in order."""
    return [kind for kind in NAMES if f"{kind}_loss" in result["by_layer"][0]]


def by_layer(result: dict[str, Any]) -> str:
    """Loss and accuracy at every layer."""
    found = kinds(result)
    heads = ["insert layer", "FLOPs", "policy's expected loss"]
    heads += [f"loss, {NAMES[kind]}" for kind in found] + [f"accuracy, {NAMES[kind]}" for kind in found]
    rows = []
    for row in result["by_layer"]:
        cells = [str(row["insert_layer"]), f"{row['flops_ratio']:.3f}", f"{row['expected_loss']:.3f}"]
        cells += [f"{row[f'{kind}_loss']['mean']:.3f}" for kind in found]
        cells += [with_interval(row[f"{kind}_accuracy"], percent) for kind in found]
        rows.append(cells)
    return markdown(heads, rows)


def correlation_table(result: dict[str, Any]) -> str:
    """Rank correlations with their intervals."""
    heads = ["known before", "with finetuned", "Spearman", "Kendall"]
    rows = []
    for predictor, name in PREDICTORS.items():
        for truth, found in result["rank_correlations"][predictor].items():
            rows.append(
                [name, "reward (-loss)" if truth == "reward" else truth]
                + [
                    with_interval({"mean": found[kind], "interval": found[f"{kind}_interval"]}, signed)
                    for kind in ("spearman", "kendall")
                ]
            )
    return markdown(heads, rows)


def choice_table(result: dict[str, Any]) -> str:
    """The layers picked at each skip weight, and their regret."""
    heads = [
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
            found = entry[chooser]
            spearman = {
                "mean": found["rank_correlation"]["spearman"],
                "interval": found["rank_correlation"]["spearman_interval"],
            }
            rows.append(
                [
                    f"{entry['skip_weight']:g}",
                    name,
                    str(found["picked"]),
                    str(found["best"]),
                    with_interval({"mean": found["regret"], "interval": found["regret_interval"]}, nats),
                    with_interval(found["accuracy_lost"], points),
                    with_interval(spearman, signed),
                ]
            )
    return markdown(heads, rows)


def shared_sentences(result: dict[str, Any]) -> str:
    """How far each model for all depths is from the separate variants."""
    lines = []
    for name, found in result["shared"].items():
        cells = [
            f"{layer}: {with_interval(difference, points)}"
            for layer, difference in zip(result["insert_layers"], found["accuracy_difference"], strict=True)
        ]
        lines.append(
            f"{NAMES[name].capitalize()}: accuracy minus that of the variant finetuned at the layer, points: "
            f"{', '.join(cells)}. Mean {with_interval(found['mean'], points)}, "
            f"least {points(found['least'])}. {steps_of(result, name)} steps took "
            f"{result['finetuning']['seconds'][name]:.0f} s, those of the separate variants together "
            f"{separate_seconds(result):.0f} s."
        )
    return "\n\n".join(lines)


def steps_of(result: dict[str, Any], name: str) -> int:
    """Optimiser steps of a model for all depths."""
    return int(result["finetuning"]["longer" if name == "longer" else "steps"])


def separate_seconds(result: dict[str, Any]) -> float:
    """Seconds that all variants with a layer of their own took."""
    seconds = result["finetuning"]["seconds"]
    return float(sum(seconds[f"finetune-{layer}"] for layer in result["insert_layers"]))


def with_interval(found: dict[str, Any], form: Any) -> str:
    """`0.87 [0.85, 0.89]`; a figure that is not defined is a dash."""
    low, high = found["interval"]
    if found["mean"] is None:
        return "-"
    return form(found["mean"]) if low is None else f"{form(found['mean'])} [{form(low)}, {form(high)}]"


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


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Loss and accuracy by layer of everything judged, and the reward that early picking loses by λ."""
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for kind in kinds(result):
        line_by_layer(left, result, kind, "loss")
        line_by_layer(middle, result, kind, "accuracy")
    left.plot(
        result["insert_layers"],
        [row["expected_loss"] for row in result["by_layer"]],
        color="tab:green",
        linestyle=":",
        label="policy's expectation",
    )
    left.set(xlabel="insert layer", ylabel="loss (nats)", yscale="log")
    middle.set(xlabel="insert layer", ylabel="accuracy")
    middle.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (left, middle):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    regrets(right, result)
    figure.legend(*left.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5)
    spearman = result["rank_correlations"]["zero_shot_reward"]["accuracy"]
    told = with_interval({"mean": spearman["spearman"], "interval": spearman["spearman_interval"]}, signed)
    figure.suptitle(
        f"Spearman correlation over layers of the frozen model's reward with finetuned accuracy: {told}"
    )
    save_figure(figure, path)


def line_by_layer(axes: Axes, result: dict[str, Any], kind: str, metric: str) -> None:
    """One figure by layer with its interval."""
    layers = result["insert_layers"]
    found = [row[f"{kind}_{metric}"] for row in result["by_layer"]]
    low, high = np.array([entry["interval"] for entry in found], dtype=float).T
    axes.plot(
        layers,
        [entry["mean"] for entry in found],
        marker="o",
        markersize=4,
        color=COLOURS[kind],
        label=NAMES[kind],
    )
    axes.fill_between(layers, low, high, color=COLOURS[kind], alpha=0.12)


def regrets(axes: Axes, result: dict[str, Any]) -> None:
    """Regret by skip weight of both ways to pick a layer early, with the layers picked."""
    entries = result["by_skip_weight"]
    places = np.arange(len(entries))
    for number, (chooser, colour) in enumerate((("zero_shot", "0.45"), ("policy", "tab:green"))):
        found = [entry[chooser] for entry in entries]
        heights = np.array([entry["regret"] for entry in found])
        low, high = np.array([entry["regret_interval"] for entry in found], dtype=float).T
        spread = np.abs(np.stack([heights - np.minimum(low, heights), np.maximum(high, heights) - heights]))
        where = places + 0.38 * (number - 0.5)
        axes.bar(where, heights, 0.36, color=colour, label=CHOOSERS[chooser])
        axes.errorbar(where, heights, spread, fmt="none", color="black", linewidth=1, capsize=2)
        for place, top, entry in zip(where, np.maximum(high, heights), found, strict=True):
            axes.annotate(
                str(entry["picked"]),
                (place, top),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    labels = [f"{entry['skip_weight']:g}\nbest {entry['zero_shot']['best']}" for entry in entries]
    axes.set_xticks(places, labels)
    axes.set(xlabel="skip weight λ, and best finetuned layer", ylabel="regret of the layer picked (nats)")
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, title="picked by (layer above bar)", fontsize=8, title_fontsize=8)
