"""Run as a program in a mount namespace of its own: finetuning on a small disk that fills up, or that becomes
read-only, at a chosen moment, and the same command again once there is room. Prints what came of it as JSON.
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

from deepinsert.controller.finetuning import checkpoints, finetune
from deepinsert.controller.finetuning import variant_trainer as trainer
from deepinsert.controller.finetuning.checkpoints import checkpoint_folders
from deepinsert.controller.options import FinetuneOptions
from deepinsert.controller.runs import folder as runs
from deepinsert.controller.runs.manifest import check_complete, sha256

SIZE = 160  # MB


def fill(disk: Path, left: int) -> None:
    """Leave `left` bytes on the disk."""
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 20))
        except OSError:
            file.truncate(max(0, file.tell() - left) // 4096 * 4096)


def remount(disk: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)


# A moment: whose method is about to be called, and for the how-manieth time.
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "start": (finetune, "start_run", 1),
    "train-begin": (trainer.LossLog, "on_train_begin", 1),
    "first-checkpoint": (checkpoints.ResumableTrainer, "save_checkpoint", 1),
    "checkpoint": (checkpoints.ResumableTrainer, "save_checkpoint", 2),
    "manifest": (checkpoints, "write_manifest", 2),
    "log": (trainer.LossLog, "on_log", 3),
    "final-save": (finetune, "save_variant", 1),
    "cards": (finetune, "write_cards", 1),
    "result": (finetune, "write_result", 1),
}


def spoiling(moment: str, spoil: Callable[[], None]) -> Callable[[], None]:
    """Have `spoil` called right before the moment; returns what takes the trap away again."""
    owner, name, call = MOMENTS[moment]
    original = getattr(owner, name)
    calls = 0

    def trap(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            spoil()
        return original(*args, **kwargs)

    setattr(owner, name, trap)
    return lambda: setattr(owner, name, original)


def main(disk: Path, options: FinetuneOptions, cases: list[tuple[str, str, int]]) -> None:
    """Each case: "full", "read-only" or "none", the moment, and the bytes that a full disk has left."""
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}m", "tmpfs", str(disk)], check=True)
    for trouble, moment, left in cases:
        run = replace(options, out=disk / f"{trouble}-{moment}-{left}")
        training = run.out / finetune.TRAINING

        def spoil(trouble: str = trouble, left: int = left) -> None:
            if trouble == "full":
                fill(disk, left)
            elif trouble == "read-only":
                remount(disk, "ro")

        mend = spoiling(moment, spoil)
        error: Any = None
        try:
            finetune.run(run)
        except Exception as raised:
            error = raised
        mend()
        complete = [path.name for path in checkpoint_folders(training) if (path / "manifest.json").is_file()]
        found: dict[str, Any] = {
            "case": [trouble, moment, left],
            "error": error and [type(error).__name__, str(error)],
            "complete": complete,
            "whole": [check_complete(training / name)["step"] for name in complete],
            "result": (run.out / "result.json").exists(),
        }
        if trouble != "read-only":
            (disk / "filler").unlink(missing_ok=True)
        else:
            remount(disk, "rw")
        finetune.run(run)
        found["sum"] = sha256(run.out / "checkpoint" / "model.safetensors")
        found["litter"] = [path.name for path in run.out.iterdir() if path.name.startswith(".")]
        found["curve"] = runs.read_result(run.out)["train_loss_curve"]
        print(json.dumps(runs.to_json(found)), flush=True)
        subprocess.run(["rm", "-r", str(run.out)], check=True)


if __name__ == "__main__":
    threads, *arguments = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    main(*arguments)
