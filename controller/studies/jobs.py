"""Runs commands side by side, each in a process of its own with its share of the threads."""

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


def run_steps(steps: Mapping[str, Any], jobs: int, logs: Path) -> dict[str, dict[str, Any]]:
    """Run the command of each step, and return the results by the steps' names.

    A command that has finished with the same options is not repeated; its result is read. With one job the
    commands run in this process, one after the other. With several jobs they run in processes of their own,
    and their output goes to log files. If a command raises an error, it is raised here after the commands
    that run at the same time have ended.

    Args:
        steps: the options of each step; no two steps share a run folder.
        jobs: the number of commands that run at the same time.
        logs: the folder of the log files.
    """
    finished = {name: finished_result(options) for name, options in steps.items()}
    results = {name: result for name, result in finished.items() if result is not None}
    missing = {name: options for name, options in steps.items() if name not in results}
    if jobs == 1 or len(missing) < 2:
        for name, options in missing.items():
            print(f"\n== {name}", flush=True)
            results[name] = run_of(options)(options)
    elif missing:
        results |= run_in_processes(missing, jobs, logs)
    return {name: results[name] for name in steps}


def run_in_processes(steps: Mapping[str, Any], jobs: int, logs: Path) -> dict[str, dict[str, Any]]:
    """Run unfinished steps in processes; arguments and errors are those of `run_steps`."""
    import torch

    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, torch.get_num_threads() // jobs)
    print(f"\n== {', '.join(steps)}: {jobs} at a time, {threads} threads each, output in {logs}", flush=True)
    results = {}
    # A forked process may hang if its parent has used torch's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, prepare_process, (threads, os.getpid())) as pool:
        futures = {
            pool.submit(run_with_log, options, logs / f"{name}.log"): name for name, options in steps.items()
        }
        try:
            for future in as_completed(futures):
                name = futures[future]
                results[name], seconds = future.result()
                print(f"{name}: {seconds:.0f} s", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def prepare_process(threads: int, parent: int) -> None:
    """Set the number of threads of a new process, and let it end when its parent has ended."""
    threading.Thread(target=exit_with_parent, args=(parent,), daemon=True).start()
    quieten()
    import torch

    torch.set_num_threads(threads)


def exit_with_parent(parent: int) -> None:
    """End this process when its parent has ended, so that a restarted study finds its folders unused."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


def run_with_log(options: Any, log: Path) -> tuple[dict[str, Any], float]:
    """Run one command with its output in `log`; return its result and its duration in seconds."""
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        result = run_of(options)(options)
    return result, time.monotonic() - started


def run_of(options: Any) -> Any:
    """Return the function `run` of the command that these options belong to."""
    module = next(command.module for command in COMMANDS.values() if command.options is type(options))
    return importlib.import_module(f"deepinsert.controller.{module}").run


def finished_result(options: Any) -> dict[str, Any] | None:
    """Return the result of a command that has finished with these options; None if there is none."""
    is_finished = same_run(options) and (Path(options.out) / "result.json").is_file()
    return read_result(options.out) if is_finished else None
