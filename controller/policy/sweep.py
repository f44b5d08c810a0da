"""`deepinsert sweep`: loss and accuracy of an untouched backbone at every insert layer (paper, Appendix C).

Shows, before any training, how much each source of prompts minds that its multimodal tokens enter late. The
table it writes is what policies are trained on and judged by.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from deepinsert.controller.runs.folder import read_result, same_run, start_run, write_result
from deepinsert.controller.runs.processes import Processes
from deepinsert.envs.prompts import Prompt, prompts_from
from deepinsert.envs.rewards.cells import columns_of, prompt_columns, take_over
from deepinsert.envs.rewards.files import RewardFiles
from deepinsert.envs.rewards.keys import shards_of
from deepinsert.envs.rewards.table import RewardTable

from .sweep_figures import Measured, figures, plot, summary

GROWING = ("insert_layers", "sources", "fraction", "accuracy", "agreement", "table")
"""Options that may change in a run folder: what the table knows already is used, the rest added to it."""


def run(options: SweepOptions) -> dict[str, Any]:
    """Write `table/` (a `RewardTable`), `sweep.png` and `result.json`; return the result.

    The table is a folder of Parquet shards (`envs.rewards.files`), in `--out` or wherever `--table` says, so
    that several sweeps of one backbone may share it. A shard is written when it is done; a killed run
    computes the others when it is started again. The same `--out` with other layers, sources, a larger
    fraction or further figures computes what is not yet there; `result.json` and `sweep.png` are those of the
    last command. The table's bits are those of computing all of it at once on the same kind of device (on a
    CPU by one thread; several processes use several cores). Images are computed in groups, so those of a
    group that gains an image or a question are computed again.

    With `--shard i/n`, or under `torchrun` or `accelerate launch`, n processes do a part of the shards each,
    with nothing but the folder in common. Whoever finds everything done writes the result; the others say
    what is missing and return `{"missing": cells}`.

    Raises `ValueError` where the folder holds another run or an option cannot be used, `DatasetError` where
    the data cannot.
    """
    processes = Processes.from_environment()
    share = parse_shard(options.shard) or (processes.rank, processes.world_size)
    for name, value in (("--batch-size", options.batch_size), ("--batch-tokens", options.batch_tokens)):
        if value < 1:
            raise ValueError(f"{name} {value}: give at least 1")
    finished = same_run(options) and (Path(options.out) / "result.json").is_file()
    out = start_run(options, GROWING)
    if finished:
        result = read_result(out)
        print(summary(result))
        return result
    (out / "result.json").unlink(missing_ok=True)  # of other options
    backbone = load_backbone(options.backbone, device=device_of(options), dtype=options.dtype)
    layers = parse_layers(options.insert_layers, backbone.num_layers)
    data = read_data(options)
    prompts = prompts_from(data, per="turn")
    known = layers if not options.agreement else tuple(sorted({0, *layers}))
    table = RewardTable(backbone, prompts, known, batch_tokens=options.batch_tokens)
    files = RewardFiles(options.table or out / "table", table.origin)
    sweep = Sweep(backbone, prompts, table, files, layers if options.accuracy else (), options.batch_size)
    undone = sweep.run(*share, options.shard_prompts)
    if table.apart:
        print(f"Questions ran by themselves, sharing no prefix: {table.apart}", file=sys.stderr)
    if undone:
        print(undone, file=sys.stderr)
        return {"missing": sweep.missing()}
    result = {
        "insert_layers": list(layers),
        "num_layers": backbone.num_layers,
        **figures(Measured(table, layers, options.accuracy, options.agreement)),
        "skipped": [repr(record) for record in data.skipped],
        "table_digest": table.digest,
    }
    plot(result, out / "sweep.png")
    write_result(out, result)
    print(summary(result))
    return result


@dataclass
class Sweep:
    """A table that is filled from its folder and into it, with the accuracy at the `judged` insert layers."""

    backbone: Backbone
    prompts: Sequence[Prompt]
    table: RewardTable
    files: RewardFiles
    judged: tuple[int, ...]
    batch_size: int

    def run(self, part: int, parts: int, shard_prompts: int) -> str:
        """Compute the shards of one part. Says which shards nobody has done yet; empty where all are."""
        take_over(self.table, self.files.read_new(), same_group=True)
        groups = self.table.groups
        shards = [np.concatenate([groups[g] for g in shard]) for shard in shards_of(groups, shard_prompts)]
        mine = range(part, len(shards), parts)
        self.files.write_prompts(prompt_columns(self.table))
        label = "sweep" if parts == 1 else f"sweep {part}/{parts}"
        total = sum(self.missing(shards[number]) for number in mine)
        seconds = 0.2 if sys.stderr.isatty() else 10.0
        with tqdm(total=total, desc=label, unit=" cells", file=sys.stderr, mininterval=seconds) as bar:
            for number in mine:
                self.do_shard(number, shards[number], bar.update)
        take_over(self.table, self.files.read_new(), same_group=True)
        undone = [number for number, rows in enumerate(shards) if self.missing(rows)]
        if not undone:
            self.files.complete()
            return ""
        others = ", ".join(
            f"--shard {other}/{parts}" for other in sorted({number % parts for number in undone})
        )
        return (
            f"Part {part}/{parts} is done. Of all {len(shards)} shards {len(undone)} are not: the result is "
            f"written by whoever finishes last of {others}"
        )

    def do_shard(self, number: int, rows: NDArray[np.int64], told: Callable[[int], object]) -> None:
        """Compute what is missing of the prompts `rows` and write it to a file."""
        table = self.table
        new = np.isnan(table.losses[rows])
        for group in np.unique(table.group_of[rows[new.any(axis=1)]]):
            members = table.groups[group]
            prompts, columns = np.nonzero(np.isnan(table.losses[members]))
            table.compute(members[prompts], columns)
            told(len(prompts))
        wanted = self.unjudged(rows)
        if wanted.any():
            asked = [self.prompts[row] for row in rows]
            greedy = table.greedy[rows] == 1
            judged = greedy_correctness(
                self.backbone, asked, table.insert_layers, greedy, wanted, self.batch_size, told
            )
            table.correct[rows] = np.where(wanted, judged, table.correct[rows])
        places, columns = np.nonzero(new | wanted)
        if len(places):
            self.files.write(f"losses-{number:05d}", columns_of(table, rows[places], columns))

    def unjudged(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Cells of the prompts `rows` whose accuracy is asked for and not known, (rows, K)."""
        return np.isnan(self.table.correct[rows]) & np.isin(self.table.insert_layers, self.judged)

    def missing(self, rows: NDArray[np.int64] | None = None) -> int:
        """Losses and answers that are asked for and not known, of some prompts or of all."""
        rows = np.arange(len(self.table)) if rows is None else rows
        return int(np.isnan(self.table.losses[rows]).sum() + self.unjudged(rows).sum())


def device_of(options: SweepOptions) -> str:
    """The device to use: with "auto" and several processes on a machine, each has its own GPU."""
    processes = Processes.from_environment()
    if options.device == "auto" and processes.local_rank is not None and torch.cuda.is_available():
        return processes.cuda_device(torch.cuda.device_count())
    return options.device
