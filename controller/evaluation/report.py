"""`deepinsert report`: joins evaluations of the same variants on several benchmarks into one Table 1."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from deepinsert.controller.options import ReportOptions
from deepinsert.controller.runs.command import run_command
from deepinsert.controller.runs.folder import read_config, read_result

from .table1 import markdown, write_table1
from .variants import variant_names


def run(options: ReportOptions) -> dict[str, Any]:
    """Write `table1.md`, `table1.json`, `figure1.png` and `result.json` of several evaluations.

    Raises:
        ValueError: a folder does not hold a finished evaluate, or the evaluations have different baselines or
            different insert layers for one name.
    """
    return run_command(options, partial(join_evaluations, options), markdown, reuse=False)


def join_evaluations(options: ReportOptions, out: Path) -> dict[str, Any]:
    """Read the evaluations that the options name, write their table to `out`, and return it."""
    results = []
    for name, folder in zip(variant_names(options.runs, "--runs"), options.runs, strict=True):
        config = read_config(folder)
        if config is None or config["command"] != "evaluate" or not (folder / "result.json").is_file():
            raise ValueError(f"--runs {folder}: the folder does not hold a finished evaluate")
        results.append(read_result(folder) | {"run": name})
    return write_table1(results, out)
