"""Variants beside the baseline, over all prompts and by source: the figures, the table and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from envs.prompts import Prompt

from ..runs import describe_machine, save_figure
from ..statistics import mean_interval, paired_interval
from .judged import Variant
from .timing import Timing, measure_cache, time_variants

ALL = ""  # the group of all prompts; no source has an empty name
CACHE_SAMPLE = 16  # prompts of each source whose cache is weighed


@dataclass(frozen=True)
class Predictions:
    """What a variant made of P prompts: answers, whether each is right, and losses in nats, (P) each.

    `flops` (P, 2) are those of the prefill at the variant's insert layer and at layer 0.
    """

    answers: list[str]
    correct: NDArray[np.float64]
    losses: NDArray[np.float64]
    flops: NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """All that was measured of V variants on P prompts; the first variant is the baseline.

    `groups` names rows of prompts: each source's, and all under `ALL`. `timings[group][variant]` are of a
    batch of the group, `caches[variant][source]` (sampled prompts, 2) bytes as measured and by the formula.
    """

    variants: Sequence[Variant]
    prompts: Sequence[Prompt]
    predictions: Sequence[Predictions]
    groups: dict[str, NDArray[np.int64]]
    timings: dict[str, list[Timing]]
    caches: list[dict[str, NDArray[np.float64]]]

    @classmethod
    def measure(
        cls,
        variants: Sequence[Variant],
        prompts: Sequence[Prompt],
        predictions: Sequence[Predictions],
        batch_size: int,
        repeats: int,
    ) -> Comparison:
        """Time the variants in turns on a batch of each source, and weigh their caches."""
        groups = by_source(prompts)
        sources = {name: rows for name, rows in groups.items() if name != ALL}

        # With one source its batch would be that of all prompts.
        timed = groups if len(sources) > 1 else {ALL: groups[ALL]}
        batches = {name: spread(rows, batch_size) for name, rows in timed.items()}
        timings = time_variants(variants, prompts, batches, repeats)
        weighed = {name: spread(rows, CACHE_SAMPLE) for name, rows in sources.items()}
        caches = [
            {
                name: np.array(
                    measure_cache(
                        variant.backbone,
                        [prompts[row] for row in rows],
                        variant.insert_layers[rows].tolist(),
                    ),
                    dtype=np.float64,
                )
                for name, rows in weighed.items()
            }
            for variant in variants
        ]
        return cls(variants, prompts, predictions, groups, timings, caches)

    @property
    def sources(self) -> list[str]:
        """Names of the sources, in order."""
        return [name for name in self.groups if name != ALL]

    def row(self, index: int) -> dict[str, Any]:
        """Figures of one variant over all prompts and, under `per_source`, for each source."""
        variant = self.variants[index]
        return {
            "name": variant.name,
            "path": variant.path,
            "insert_layer": variant.insert_layer,
            "num_layers": variant.backbone.num_layers,
            **({} if variant.policy is None else {"skip_weight": variant.skip_weight}),
            **self.figures(index, ALL),
            "per_source": {name: self.figures(index, name) for name in self.sources},
        }

    def figures(self, index: int, group: str) -> dict[str, Any]:
        """Figures of one variant on one group; differences and ratios of time are against the baseline.

        Intervals are at 95 %, clustered by image; FLOPs and cache bytes are means over prompts.
        """
        rows = self.groups[group]
        mine, first = self.predictions[index], self.predictions[0]
        flops, stock = mine.flops[rows].mean(axis=0)
        measured, formula = self.cache(index, group)
        return {
            "prompts": len(rows),
            **self.layers(index, rows),
            **self.mean_and_difference("accuracy", mine.correct, first.correct, rows),
            **self.mean_and_difference("loss", mine.losses, first.losses, rows),
            "flops": flops,
            "flops_ratio": flops / stock,
            **self.times(index, group),
            "kv_cache_bytes": measured,
            "kv_cache_bytes_formula": formula,
        }

    def layers(self, index: int, rows: NDArray[np.int64]) -> dict[str, Any]:
        """What a policy chose: mean layer and counts by layer, of the prompts that have an image."""
        variant = self.variants[index]
        if variant.policy is None:
            return {}
        chosen = variant.insert_layers[[row for row in rows if self.prompts[row].images]]
        counts = {str(layer): int((chosen == layer).sum()) for layer in variant.policy.insert_layers}
        return {"mean_insert_layer": chosen.mean() if len(chosen) else None, "histogram": counts}

    def mean_and_difference(
        self, name: str, mine: NDArray[np.float64], first: NDArray[np.float64], rows: NDArray[np.int64]
    ) -> dict[str, Any]:
        """A mean with its interval, and how far it lies from the baseline's, prompt by prompt."""
        clusters = [self.prompts[row].image_key for row in rows]
        mean = mean_interval(mine[rows], clusters)
        difference = paired_interval(mine[rows], first[rows], clusters)
        return {
            name: mean.mean,
            f"{name}_interval": [mean.low, mean.high],
            f"{name}_difference": difference.mean,
            f"{name}_difference_interval": [difference.low, difference.high],
        }

    def times(self, index: int, group: str) -> dict[str, Any]:
        """Median times in ms with quartiles, and ratios against the baseline in the same repeats."""
        timings = self.timings.get(group, self.timings[ALL])
        mine, first = timings[index], timings[0]
        values = {
            "prefill_ms": np.array(mine.prefill_ms),
            "decode_ms": np.array(mine.decode_ms),
            "time_ratio": np.divide(mine.prefill_ms, first.prefill_ms),
            "decode_time_ratio": np.divide(mine.decode_ms, first.decode_ms),
        }
        if self.variants[index].policy is not None:
            values["choice_ms"] = np.array(mine.choice_ms)
        found: dict[str, Any] = {"batch_size": mine.batch_size}
        for name, measured in values.items():
            low, median, high = np.quantile(measured, [0.25, 0.5, 0.75])
            found |= {name: median, f"{name}_quartiles": [low, high]}
        return found

    def cache(self, index: int, group: str) -> NDArray[np.float64]:
        """Mean bytes of a prompt's cache, measured and by the formula; a source weighs as its prompts do."""
        names = self.sources if group == ALL else [group]
        means = np.array([self.caches[index][name].mean(axis=0) for name in names])
        return np.average(means, axis=0, weights=[len(self.groups[name]) for name in names])


def by_source(prompts: Sequence[Prompt]) -> dict[str, NDArray[np.int64]]:
    """Rows of all prompts, under `ALL`, and of those of each source, in order of name."""
    sources = np.array([prompt.source for prompt in prompts])
    groups = {str(source): np.flatnonzero(sources == source) for source in np.unique(sources)}
    return {ALL: np.arange(len(prompts)), **groups}


def spread(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most `count` of `rows`, evenly spaced."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))]


def table(result: dict[str, Any]) -> str:
    """The result for a terminal: a line for each variant, then accuracy by source."""
    heads = ("variant", "layer", "accuracy [95 %]", "loss", "FLOPs", "prefill", "time", "decode", "KV cache")
    lines = []
    for row in result["variants"]:
        low, high = row["accuracy_interval"]
        lines.append(
            (
                row["name"],
                f"{layer_of(row)}/{row['num_layers']}",
                f"{row['accuracy']:.1%} [{low:.1%}, {high:.1%}]",
                f"{row['loss']:.3f}",
                f"{row['flops_ratio']:.3f}",
                f"{row['prefill_ms']:.1f} ms",
                f"{row['time_ratio']:.3f}",
                f"{row['decode_ms']:.2f} ms",
                f"{row['kv_cache_bytes'] / 1000:,.1f} kB",
            )
        )
    sources = list(result["variants"][0]["per_source"])
    accuracies = [
        (row["name"], *(f"{row['per_source'][name]['accuracy']:.1%}" for name in sources))
        for row in result["variants"]
    ]
    note = (
        f"{result['prompts']} prompts about {result['images']} images. FLOPs: prefill against insert layer "
        f"0. Time: prefill against {result['baseline']}.\n"
        f"Prefill and decode (per token): batches of {result['variants'][0]['batch_size']}, "
        f"{describe_machine(result['timing']['machine'])}."
    )
    blocks = [[heads, *lines], [("accuracy by source", *sources), *accuracies]]
    return "\n\n".join(["\n".join(columns(block)) for block in blocks] + [note])


def layer_of(row: dict[str, Any]) -> str:
    """A variant's insert layer, or the mean of those that its policy chose."""
    if row["insert_layer"] is not None:
        return str(row["insert_layer"])
    mean = row["mean_insert_layer"]
    return "mean -" if mean is None else f"mean {mean:.2f}"


def columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells as text, the first column to the left and the others to the right."""
    widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    """Accuracy against prefill time (the paper's Figure 1), accuracy by source, and costs."""
    variants = result["variants"]
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    scatter, sources, costs = figure.subplots(1, 3)
    for row in variants:
        low, high = row["accuracy_interval"]
        error = [[row["accuracy"] - low], [high - row["accuracy"]]]
        label = f"{row['name']} (layer {layer_of(row)})"
        scatter.errorbar(row["prefill_ms"], row["accuracy"], error, fmt="o", capsize=3, label=label)
    scatter.set(xlabel="measured prefill of a batch (ms)", ylabel="accuracy", title="Accuracy against time")
    scatter.set_xlim(0, 1.1 * max(row["prefill_ms"] for row in variants))
    scatter.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    figure.legend(loc="outside lower center", ncols=len(variants), frameon=False)
    names = list(variants[0]["per_source"])
    bars(sources, names, [[row["per_source"][name]["accuracy"] for name in names] for row in variants])
    sources.set(title="Accuracy by source", ylim=(0, 1))
    sources.yaxis.set_major_formatter(PercentFormatter(1))
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


def bars(axes: Axes, names: Sequence[str], heights: Sequence[Sequence[float]]) -> None:
    """A group of bars at each name, one for each variant, in the order of the legend's colours."""
    width = 0.8 / len(heights)
    for index, values in enumerate(heights):
        offset = (index - (len(heights) - 1) / 2) * width
        axes.bar(np.arange(len(names)) + offset, values, width)
    axes.set_xticks(range(len(names)), names)
