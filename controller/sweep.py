"""`deepinsert sweep`: loss and accuracy of an untouched backbone at every insert layer (paper, Appendix C).

Shows, before any training, how much each source of prompts minds that its multimodal tokens enter late.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from backbones import Backbone, load_backbone
from envs.prompts import Prompt, prompts_from
from envs.rewards import RewardTable, save_arrays

from .answers import generation_inputs
from .data import read_data
from .metrics import exact_match
from .options import SweepOptions, parse_layers
from .runs import progress, read_result, save_figure, start_run, write_result
from .statistics import mean_interval, paired_interval

EXTRA_TOKENS = 4
"""How many tokens longer than the longest reference of its batch an answer may become."""

SAVE_SECONDS = 10.0
"""At most so much work is lost when the command is killed."""

UNKNOWN = -1


def run(options: SweepOptions) -> dict[str, Any]:
    """Write `table.npz` (a `RewardTable`), `accuracy.npz`, `sweep.png` and `result.json`; return the result.

    What a killed run has computed is kept, and a finished run is not repeated. Raises `ValueError` where
    the folder holds another run or an option cannot be used, `DatasetError` where the data cannot.
    """
    if options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size}: give at least 1")
    out = start_run(options)
    if (out / "result.json").is_file():
        result = read_result(out)
        print(summary(result))
        return result
    backbone = load_backbone(options.backbone, device=options.device, dtype=options.dtype)
    insert_layers = parse_layers(options.insert_layers, backbone.num_layers)
    data = read_data(options)
    prompts = prompts_from(data, per="turn")
    table = RewardTable(backbone, prompts, insert_layers, options.batch_size)
    fill(table, out / "table.npz")
    correct = judge(backbone, prompts, table, out / "accuracy.npz") if options.accuracy else None
    result = {
        "insert_layers": list(insert_layers),
        "num_layers": backbone.num_layers,
        **figures(table, correct),
        "skipped": [repr(record) for record in data.skipped],
    }
    plot(result, out / "sweep.png")
    write_result(out, result)
    print(summary(result))
    return result


def fill(table: RewardTable, path: Path) -> None:
    """Compute the losses that `path` does not hold yet, saving them there on the way."""
    if path.is_file():
        print(f"{path} holds {table.restore(path)} of {len(table)} prompts", file=sys.stderr)
    save = Saver(lambda: table.save(path))
    for _ in progress(table.fill_by_block(), "losses", total=table.missing_blocks()):
        save.soon()
    save.now()


def judge(backbone: Backbone, prompts: Sequence[Prompt], table: RewardTable, path: Path) -> NDArray[np.int8]:
    """Whether each prompt is answered right at each insert layer, (P, K) of 0 and 1.

    Answers are greedy and judged by `exact_match`. What `path` holds already is kept, the rest saved there on
    the way.
    """
    correct = np.full(table.losses.shape, UNKNOWN, dtype=np.int8)
    if path.is_file():
        with np.load(path, allow_pickle=False) as file:
            if file["identity"].item() != table.identity:
                raise ValueError(
                    f"{path} belongs to another backbone, other prompts, insert layers or batch size; "
                    "remove it or choose another folder"
                )
            correct = file["correct"]
    save = Saver(lambda: save_arrays(path, correct=correct, identity=np.array(table.identity)))
    unknown = (correct == UNKNOWN).any(axis=1)
    starts = [
        start
        for start in range(0, len(prompts), table.batch_size)
        if unknown[start : start + table.batch_size].any()
    ]
    for start in progress(starts, "answers"):
        rows = slice(start, start + table.batch_size)
        batch = prompts[rows]
        answers = answers_at_layers(backbone, batch, table.insert_layers)
        correct[rows] = [
            [exact_match(answer, prompt.answer) for answer in given]
            for prompt, given in zip(batch, zip(*answers, strict=True), strict=True)
        ]
        save.soon()
    save.now()
    return correct


def answers_at_layers(
    backbone: Backbone, prompts: Sequence[Prompt], insert_layers: Sequence[int]
) -> list[list[str]]:
    """Greedy answers of a batch of prompts, a list for each insert layer; the batch is encoded once."""
    model: Any = backbone.model
    tokenizer = backbone.tokenizer
    references = tokenizer([prompt.answer for prompt in prompts], add_special_tokens=False)["input_ids"]
    longest = max(len(ids) for ids in references) + EXTRA_TOKENS
    inputs = generation_inputs(backbone, prompts)
    length = inputs["input_ids"].shape[1]
    answers = []
    for layer in insert_layers:
        with torch.inference_mode(), backbone.insert_at(layer):
            tokens = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=longest)
        answers.append(tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True))
    return answers


def figures(table: RewardTable, correct: NDArray[np.int8] | None) -> dict[str, Any]:
    """The figures of `result.json`: over all prompts and, under `per_source`, for each source."""
    sources = np.array(table.sources)
    groups = {str(source): np.flatnonzero(sources == source) for source in np.unique(sources)}
    return {
        **group_figures(table, correct, np.arange(len(table))),
        "per_source": {source: group_figures(table, correct, rows) for source, rows in groups.items()},
    }


def group_figures(
    table: RewardTable, correct: NDArray[np.int8] | None, rows: NDArray[np.int64]
) -> dict[str, Any]:
    """Counts, and by insert layer loss and accuracy of some prompts with 95 % intervals, clustered by image.

    `loss_difference` is against the shallowest candidate, prompt by prompt. `accuracy` is None where it was
    not asked for.
    """
    clusters = [table.image_keys[row] for row in rows]
    losses = table.losses[rows]
    flops_ratio = table.flops[rows].sum(axis=0) / table.stock_flops[rows].sum()
    by_layer = []
    for column, layer in enumerate(table.insert_layers):
        loss = mean_interval(losses[:, column], clusters)
        difference = paired_interval(losses[:, column], losses[:, 0], clusters)
        right = None if correct is None else mean_interval(correct[rows, column], clusters)
        by_layer.append(
            {
                "insert_layer": layer,
                "depth": layer / table.num_layers,
                "loss": loss.mean,
                "loss_interval": [loss.low, loss.high],
                "loss_difference": difference.mean,
                "loss_difference_interval": [difference.low, difference.high],
                "accuracy": None if right is None else right.mean,
                "accuracy_interval": None if right is None else [right.low, right.high],
                "flops_ratio": flops_ratio[column],
            }
        )
    images = {table.image_keys[row] for row in rows if table.sources[row] != "text"}
    return {"prompts": len(rows), "images": len(images), "by_layer": by_layer}


def summary(result: dict[str, Any]) -> str:
    """The result as a short table for a terminal."""
    lines = [
        f"{result['prompts']} prompts, {result['images']} images, untouched backbone; 95 % intervals",
        f"{'insert layer':>12}  {'loss (nats)':^24}  {'accuracy':^24}  {'FLOPs':>6}",
    ]
    for row in result["by_layer"]:
        low, high = row["loss_interval"]
        accuracy = "-"
        if row["accuracy"] is not None:
            bounds = "[{:.1%}, {:.1%}]".format(*row["accuracy_interval"])
            accuracy = f"{row['accuracy']:.1%} {bounds}"
        loss = f"{row['loss']:.3f} [{low:.3f}, {high:.3f}]"
        lines.append(f"{row['insert_layer']:>12}  {loss:^24}  {accuracy:^24}  {row['flops_ratio']:>6.3f}")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Loss, and accuracy where it was measured, by insert layer: a line for each source and one for all."""
    groups = {"all": result, **(result["per_source"] if len(result["per_source"]) > 1 else {})}
    metrics = {"loss": "loss (nats)", "accuracy": "accuracy"}
    if result["by_layer"][0]["accuracy"] is None:
        del metrics["accuracy"]
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
    if "accuracy" in metrics:
        panels[1].yaxis.set_major_formatter(PercentFormatter(1))
        panels[1].set_ylim(-0.02, 1.02)
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside right center")
    figure.suptitle(
        f"Untouched backbone of {result['num_layers']} layers; {result['prompts']} prompts, 95 % intervals"
    )
    save_figure(figure, path)


class Saver:
    """Saves now and then, not so often that saving becomes the work."""

    def __init__(self, save: Callable[[], None]) -> None:
        self.save = save
        self.next = time.monotonic() + SAVE_SECONDS

    def soon(self) -> None:
        """Save if that was last done long enough ago."""
        if time.monotonic() >= self.next:
            self.now()

    def now(self) -> None:
        """Save."""
        started = time.monotonic()
        self.save()
        ended = time.monotonic()
        self.next = ended + max(SAVE_SECONDS, 20 * (ended - started))
