"""Commands run side by side, each in a process of its own with its share of the threads."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from deepinsert.controller.cli import COMMANDS, quieten
from deepinsert.controller.runs.folder import read_result, same_run

WATCH_SECONDS = 0.5


def play(steps: Mapping[str, Any], jobs: int, logs: Path) -> dict[str, dict[str, Any]]:
    """The result of each command by name; `steps` hold their options, whose run folders are theirs alone.

    A command that has finished with these options is read. With one job they run here, one after the other;
    with more in processes, whose output goes to `logs`. Raises what a command raised, when those that were
    running beside it are done.
    """
    finished = {name: finished_result(options) for name, options in steps.items()}
    results = {name: result for name, result in finished.items() if result is not None}
    missing = {name: options for name, options in steps.items() if name not in results}
    if jobs == 1 or len(missing) < 2:
        for name, options in missing.items():
            print(f"\n== {name}", flush=True)
            results[name] = run_of(options)(options)
    elif missing:
        results |= in_processes(missing, jobs, logs)
    return {name: results[name] for name in steps}


def in_processes(steps: Mapping[str, Any], jobs: int, logs: Path) -> dict[str, dict[str, Any]]:
    """As `play`, for commands that are all still to run."""
    import torch

    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, torch.get_num_threads() // jobs)
    print(f"\n== {', '.join(steps)}: {jobs} at a time, {threads} threads each, output in {logs}", flush=True)
    results = {}
    # Forking a process that has used torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, prepare, (threads, os.getpid())) as pool:
        started = {pool.submit(work, options, logs / f"{name}.log"): name for name, options in steps.items()}
        try:
            for done in as_completed(started):
                name = started[done]
                results[name], seconds = done.result()
                print(f"{name}: {seconds:.0f} s", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def prepare(threads: int, parent: int) -> None:
    """Make a process ready: its threads, and an end when its parent is gone."""
    threading.Thread(target=leave_with, args=(parent,), daemon=True).start()
    quieten()
    import torch

    torch.set_num_threads(threads)


def leave_with(parent: int) -> None:
    """End this process when its parent has: the study that goes on must not find its folders in use."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


def work(options: Any, log: Path) -> tuple[dict[str, Any], float]:
    """Run one command with its output in `log`; its result, and the seconds it took."""
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        result = run_of(options)(options)
    return result, time.monotonic() - started


def run_of(options: Any) -> Any:
    """The `run` of the command that these options belong to."""
    module = next(command.module for command in COMMANDS.values() if command.options is type(options))
    return importlib.import_module(f"deepinsert.controller.{module}").run


def finished_result(options: Any) -> dict[str, Any] | None:
    """The result of a command that has finished with these options; None where it has not."""
    whole = same_run(options) and (Path(options.out) / "result.json").is_file()
    return read_result(options.out) if whole else None
