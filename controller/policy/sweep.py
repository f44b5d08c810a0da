"""`deepinsert sweep`: loss and accuracy of an untouched backbone at every insert layer (paper, Appendix C).

The figures show, before any training, how much each source of prompts loses when its multimodal tokens enter
late. Policies are trained and compared on the reward table that the command writes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from deepinsert.backbones import Backbone, load_backbone
from deepinsert.controller.answers.greedy import greedy_correctness
from deepinsert.controller.option_checks import parse_layers, parse_shard
from deepinsert.controller.options import SweepOptions
from deepinsert.controller.prompt_selection import read_data
from deepinsert.controller.runs.command import run_command
from deepinsert.controller.runs.processes import Processes
from deepinsert.envs.prompts import Prompt, prompts_from
from deepinsert.envs.rewards.keys import shards_of
from deepinsert.envs.rewards.table import RewardTable
from deepinsert.envs.rewards.table_folder import TableFolder

from .sweep_figures import FigureSelection, figures, plot, summary

GROWING = ("insert_layers", "sources", "fraction", "accuracy", "agreement", "table")
"""Options that may change in a run folder: the table's cells are used again, and missing ones are added."""


def run(options: SweepOptions) -> dict[str, Any]:
    """Write `table/` (a `RewardTable`), `sweep.png` and `result.json`; return the result.

    The table is a folder of Parquet shards (`envs.rewards.files`), in `--out` or where `--table` says, and
    several sweeps of one backbone may share it. A shard is written when it is done, so a killed run continues
    with the other shards when it is started again. The same `--out` with other layers, sources, a larger
    fraction or more figures computes only what is missing; `result.json` and `sweep.png` belong to the last
    command. The table is bit for bit the one that is computed all at once on the same kind of device (a CPU
    uses one thread; several processes use several cores). Images are computed in groups, so a group that
    gains an image or a question is computed again.

    With `--shard i/n`, or under `torchrun` or `accelerate launch`, each of n processes computes a part of the
    shards; they share only the folder. The process that finds all shards done writes the result; the others
    print which shards are missing and return an empty result.

    Raises:
        ValueError: if the folder contains another run, or an option cannot be used.
        DatasetError: if the data cannot be used.
    """
    parse_shard(options.shard)
    return run_command(options, partial(sweep_shards, options), summary, growing=GROWING)


def sweep_shards(options: SweepOptions, out: Path) -> dict[str, Any] | None:
    """Compute this process's shards; return the result, or None if other shards are missing."""
    processes = Processes.from_environment()
    part, parts = parse_shard(options.shard) or (processes.rank, processes.world_size)
    backbone = load_backbone(options.backbone, device=device_of(options), dtype=options.dtype)
    layers = parse_layers(options.insert_layers, backbone.num_layers)
    data = read_data(options)
    sweep = make_sweep(options, backbone, prompts_from(data, per="turn"), layers)
    table = sweep.table
    undone = sweep.run(part, parts, options.shard_prompts)
    if table.unshared_reason:
        print(f"Questions ran by themselves, sharing no prefix: {table.unshared_reason}", file=sys.stderr)
    if undone:
        print(undone, file=sys.stderr)
        return None
    result = {
        "insert_layers": list(layers),
        "num_layers": backbone.num_layers,
        **figures(FigureSelection(table, layers, options.accuracy, options.agreement)),
        "skipped": [repr(record) for record in data.skipped],
        "table_digest": table.digest,
    }
    plot(result, out / "sweep.png")
    return result


def make_sweep(
    options: SweepOptions, backbone: Backbone, prompts: Sequence[Prompt], layers: tuple[int, ...]
) -> Sweep:
    """Return the sweep of `prompts` at `layers`, with the losses that its folder already contains."""
    table = RewardTable(
        backbone,
        prompts,
        layers if not options.agreement else tuple(sorted({0, *layers})),
        batch_tokens=options.batch_tokens,
        folder=options.table or Path(options.out) / "table",
        same_group=True,
        flush_seconds=math.inf,  # `Sweep` writes whole shards
    )
    return Sweep(backbone, prompts, table, layers if options.accuracy else (), options.batch_size)


@dataclass(frozen=True)
class Sweep:
    """Fills a table and its folder, shard by shard.

    Attributes:
        backbone: the backbone.
        prompts: the P prompts of the table.
        table: the table, with a folder.
        graded_layers: the insert layers at which greedy answers are graded.
        batch_size: prompts per call of the model when answers are generated.
    """

    backbone: Backbone
    prompts: Sequence[Prompt]
    table: RewardTable
    graded_layers: tuple[int, ...]
    batch_size: int

    @property
    def folder(self) -> TableFolder:
        """The table's folder."""
        assert self.table.folder is not None
        return self.table.folder

    def run(self, part: int, parts: int, shard_prompts: int) -> str:
        """Compute the shards of one part.

        Args:
            part: the number of the part, from 0.
            parts: the number of parts.
            shard_prompts: prompts per shard, about.

        Returns:
            A sentence about the shards that no process has done yet; empty if all are done.
        """
        groups = self.table.groups
        shards = [np.concatenate([groups[g] for g in shard]) for shard in shards_of(groups, shard_prompts)]
        numbers = range(part, len(shards), parts)
        self.folder.write_prompts()
        label = "sweep" if parts == 1 else f"sweep {part}/{parts}"
        total = sum(self.count_missing(shards[number]) for number in numbers)
        seconds = 0.2 if sys.stderr.isatty() else 10.0
        with tqdm(total=total, desc=label, unit=" cells", file=sys.stderr, mininterval=seconds) as bar:
            for number in numbers:
                self.do_shard(number, shards[number], bar.update)
        self.folder.read()
        undone = [number for number, rows in enumerate(shards) if self.count_missing(rows)]
        if not undone:
            self.folder.write_manifest()
            return ""
        others = ", ".join(
            f"--shard {other}/{parts}" for other in sorted({number % parts for number in undone})
        )
        return (
            f"Part {part}/{parts} is done. {len(undone)} of {len(shards)} shards are missing: the last to "
            f"finish of {others} writes the result"
        )

    def do_shard(self, number: int, rows: NDArray[np.int64], advance: Callable[[int], object]) -> None:
        """Compute the missing cells of the prompts `rows` and write them to a file.

        `advance` is called with the number of cells that have been computed since the last call.
        """
        table = self.table
        unknown = np.isnan(table.losses[rows])
        for group in np.unique(table.group_of[rows[unknown.any(axis=1)]]):
            members = table.groups[group]
            member, columns = np.nonzero(np.isnan(table.losses[members]))
            table.compute(members[member], columns)
            advance(len(member))
        ungraded = self.ungraded(rows)
        if ungraded.any():
            correct = greedy_correctness(
                self.backbone,
                [self.prompts[row] for row in rows],
                table.insert_layers,
                table.greedy[rows] == 1,
                ungraded,
                self.batch_size,
                advance,
            )
            places, columns = np.nonzero(ungraded)
            table.record_correct(rows[places], columns, correct[places, columns])
        places, columns = np.nonzero(unknown | ungraded)
        if len(places):
            self.folder.write_shard(number, rows[places], columns)

    def ungraded(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which answers of the prompts `rows` have yet to be graded, (rows, K)."""
        return np.isnan(self.table.correct[rows]) & np.isin(self.table.insert_layers, self.graded_layers)

    def count_missing(self, rows: NDArray[np.int64]) -> int:
        """Return how many losses and grades of the prompts `rows` are missing."""
        return int(np.isnan(self.table.losses[rows]).sum() + self.ungraded(rows).sum())


def device_of(options: SweepOptions) -> str:
    """Return the device; with "auto" and several processes on one machine, each process gets its own GPU."""
    processes = Processes.from_environment()
    if options.device == "auto" and processes.local_rank is not None and torch.cuda.is_available():
        return processes.cuda_device(torch.cuda.device_count())
    return options.device
