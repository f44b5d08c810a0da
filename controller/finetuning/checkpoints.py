"""Checkpoints that a killed training continues from, complete or ignored.

The Trainer writes a checkpoint's files one after the other, so a kill may leave any part of them. Here a
manifest is written last; a folder without a fitting manifest does not count.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from deepinsert.backbones.compat.accelerate import uses_fsdp
from deepinsert.backbones.compat.trainer import RNG_STATE, SeamTrainer
from deepinsert.controller.runs.atomic_files import sync
from deepinsert.controller.runs.manifest import (
    MANIFEST,
    CheckpointError,
    check_complete,
    read_manifest,
    write_manifest,
)
from deepinsert.controller.runs.storage_errors import explain_storage_errors

TRAINING = "training"  # folder of the checkpoints in a run folder
KEPT = 2  # complete checkpoints: the newest, and the one before it should a disk spoil the newest

Answer = TypeVar("Answer")


def checkpoint_folders(folder: Path) -> list[Path]:
    """`checkpoint-STEP` folders in `folder`, complete or not, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def newest_complete(folder: Path, identity: dict[str, Any]) -> Path | None:
    """The newest complete checkpoint in `folder`, None without one; broken ones newer than it are removed.

    One that was complete and is spoilt now is named on stderr; one that a kill left unfinished is not.
    `identity` says what is trained on what; `CheckpointError` where the checkpoint's differs, `OSError` where
    one cannot be read, which says nothing about its files.
    """
    for path in checkpoint_folders(folder):
        try:
            manifest = check_complete(path)
        except CheckpointError as error:
            if (path / MANIFEST).exists():
                print(f"{error}; continuing from the checkpoint before it", file=sys.stderr)
            remove_checkpoint(path)
            continue
        recorded = manifest.get("identity", {})
        changed = [name for name in identity if recorded.get(name) != identity[name]]
        if changed:
            raise CheckpointError(
                f"{path} was written with another {' and '.join(changed)}: put back what the run started "
                "with, or choose another --out"
            )
        return path
    return None


def newest_name(folder: Path) -> str | None:
    """Name of the newest checkpoint in `folder` that has a manifest; its files are not read."""
    return next((path.name for path in checkpoint_folders(folder) if (path / MANIFEST).is_file()), None)


def keep_newest(folder: Path, kept: int = KEPT) -> None:
    """Remove all but the `kept` newest checkpoints."""
    for path in checkpoint_folders(folder)[kept:]:
        remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, its manifest first: no half of one must look whole."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` that takes its place, synced, when the block ends well."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for written in sorted(temporary.rglob("*")):
            sync(written)
        sync(temporary)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def how_to_continue(training: Path) -> str:
    """What a user does after an error of the disk, and where the run will then go on."""
    newest = newest_name(training)
    where = f"step {newest.rpartition('-')[2]}, {training / newest} being complete" if newest else "the start"
    return (
        "Free space there or make it writable (or copy the folder elsewhere and name that as --out), then "
        f"give the same command again: it continues from {where}."
    )


def continuable(run: Callable[[Any], Answer]) -> Callable[[Any], Answer]:
    """A command's `run(options)` whose errors of the disk say what is wrong and where it will go on."""

    @wraps(run)
    def named(options: Any) -> Answer:
        out = Path(options.out)
        with explain_storage_errors(out, lambda: how_to_continue(out / TRAINING)):
            return run(options)

    return named


def decided_by_one(decide: Callable[[], Answer], leader: bool) -> Answer:
    """What `decide` returns in the leading process, in every process; its `ValueError` or `OSError` too."""
    answer: list[Any] = [None, None]
    if leader:
        try:
            answer[0] = decide()
        except (ValueError, OSError) as error:
            answer[1] = error
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


class ResumableTrainer(SeamTrainer):
    """A `Trainer` whose checkpoints are complete or ignored and restore every weight.

    `identity` goes into each manifest: what is trained on what. A full or read-only disk is a `StorageError`
    that leaves the checkpoints before it.
    """

    def __init__(self, *args: Any, identity: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.identity = identity or {}

    @property
    def training_folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; `resume_from_checkpoint=True` means the newest complete checkpoint, if any,
        which the first process chooses for all."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = decided_by_one(self._newest, self.args.process_index == 0)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _newest(self) -> str | None:
        newest = newest_complete(self.training_folder, self.identity)
        if newest is None:
            return None
        processes = read_manifest(newest).get("processes", 1)
        if processes != self.args.world_size:
            print(
                f"{newest} was written by {processes} processes and is continued by {self.args.world_size}: "
                "random numbers (dropout) will differ from an uninterrupted run's",
                file=sys.stderr,
            )
        return str(newest)

    def save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = self.training_folder / f"checkpoint-{self.state.global_step}"
        try:
            with explain_storage_errors(folder, lambda: how_to_continue(self.training_folder)):
                if self.args.should_save:
                    remove_checkpoint(folder)  # what a kill left must not mix with this one
                self.accelerator.wait_for_everyone()
                super().save_checkpoint(model, trial)
                # A process that failed never comes here, so that no manifest is written without its files.
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._declare_complete(folder)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)  # gives its space back
            raise
        if self.args.should_save:
            keep_newest(self.training_folder)

    def _declare_complete(self, folder: Path) -> None:
        processes = self.args.world_size
        ranks = [f"_{rank}" for rank in range(processes)] if processes > 1 else [""]
        absent = [name for rank in ranks if not (folder / (name := RNG_STATE.format(process=rank))).is_file()]
        if absent and not self.args.save_on_each_node:
            raise CheckpointError(
                f"{folder} has no {absent[0]}: --out must be a folder that all processes share"
            )
        write_manifest(folder, step=self.state.global_step, processes=processes, identity=self.identity)

    def load_weights(self, checkpoint: str, model: nn.Module | None) -> None:
        """Restore the weights. The stock method loads a multimodal model's file under the names it has on
        disk, which are not those in memory, and restores nothing; `from_pretrained` knows both. Adapters, and
        what FSDP has sharded, it restores rightly."""
        target: Any = self.model if model is None else model
        sharded = uses_fsdp(self.accelerator.state)
        if isinstance(target, PeftModel) or not isinstance(target, PreTrainedModel) or sharded:
            return super().load_weights(checkpoint, model)
        kind: Any = type(target)
        restored, report = kind.from_pretrained(checkpoint, dtype=target.dtype, output_loading_info=True)
        lost = {kind: keys for kind, keys in report.items() if kind.endswith("_keys") and keys}
        if lost:
            raise CheckpointError(f"{checkpoint} does not hold this model's weights: {lost}")
        with torch.no_grad():
            target.load_state_dict(restored.state_dict(), strict=True)
