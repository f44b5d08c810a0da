"""A program for a mount namespace of its own: finetunes on a small disk that fails at a chosen moment.

The disk fills up or becomes read-only. The same command then runs again with free space. The program reads
its pickled arguments from stdin and prints the outcome of each case as one line of JSON.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deepinsert.controller.finetuning import finetune, loss_log, resumable_trainer
from deepinsert.controller.finetuning.checkpoints import checkpoint_folders
from deepinsert.controller.options import FinetuneOptions
from deepinsert.controller.runs.atomic_files import to_json
from deepinsert.controller.runs.folder import read_result
from deepinsert.controller.runs.manifest import check_complete, sha256

DISK_MEGABYTES = 160


def fill(disk: Path, free_bytes: int) -> None:
    """Fill the disk up to `free_bytes`."""
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 20))
        except OSError:
            file.truncate(max(0, file.tell() - free_bytes) // 4096 * 4096)


def remount(disk: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)


MOMENTS: dict[str, tuple[Any, str, int]] = {
    "start": (finetune, "start_run", 1),
    "train-begin": (loss_log.LossLog, "on_train_begin", 1),
    "first-checkpoint": (resumable_trainer.ResumableTrainer, "save_checkpoint", 1),
    "checkpoint": (resumable_trainer.ResumableTrainer, "save_checkpoint", 2),
    "manifest": (resumable_trainer, "write_manifest", 2),
    "log": (loss_log.LossLog, "on_log", 3),
    "final-save": (finetune, "save_variant", 1),
    "cards": (finetune, "write_cards", 1),
    "result": (finetune, "write_result", 1),
}
"""A moment is right before the n-th call of a function: its module or class, its name, and n."""


def call_at(moment: str, action: Callable[[], None]) -> Callable[[], None]:
    """Arrange that `action` is called at the moment; return a function that removes the arrangement."""
    owner, name, number = MOMENTS[moment]
    original = getattr(owner, name)
    calls = 0

    def count_and_call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            action()
        return original(*args, **kwargs)

    setattr(owner, name, count_and_call)
    return lambda: setattr(owner, name, original)


def run_case(
    disk: Path, options: FinetuneOptions, failure: str, moment: str, free_bytes: int
) -> dict[str, Any]:
    """Run the command until the disk fails, then again with free space; return what both have left.

    Args:
        disk: where the small disk is mounted.
        options: the options of the command.
        failure: "full", "read-only" or "none".
        moment: a key of `MOMENTS`.
        free_bytes: the space that a full disk has left.
    """
    run = replace(options, out=disk / f"{failure}-{moment}-{free_bytes}")
    training = run.out / finetune.TRAINING

    def fail() -> None:
        if failure == "full":
            fill(disk, free_bytes)
        elif failure == "read-only":
            remount(disk, "ro")

    restore = call_at(moment, fail)
    error: Exception | None = None
    try:
        finetune.run(run)
    except Exception as raised:
        error = raised
    restore()
    complete = [path.name for path in checkpoint_folders(training) if (path / "manifest.json").is_file()]
    outcome: dict[str, Any] = {
        "case": [failure, moment, free_bytes],
        "error": error and [type(error).__name__, str(error)],
        "complete": complete,
        "steps": [check_complete(training / name)["step"] for name in complete],
        "result": (run.out / "result.json").exists(),
    }
    if failure == "read-only":
        remount(disk, "rw")
    else:
        (disk / "filler").unlink(missing_ok=True)
    finetune.run(run)
    outcome["sha256"] = sha256(run.out / "checkpoint" / "model.safetensors")
    outcome["hidden"] = [path.name for path in run.out.iterdir() if path.name.startswith(".")]
    outcome["curve"] = read_result(run.out)["train_loss_curve"]
    subprocess.run(["rm", "-r", str(run.out)], check=True)
    return outcome


def main(disk: Path, options: FinetuneOptions, cases: list[tuple[str, str, int]]) -> None:
    """Mount the disk and run each case (failure, moment, free bytes) on it."""
    disk.mkdir(exist_ok=True)
    size = f"size={DISK_MEGABYTES}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)], check=True)
    for case in cases:
        print(json.dumps(to_json(run_case(disk, options, *case))), flush=True)


if __name__ == "__main__":
    threads, *arguments = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    main(*arguments)
