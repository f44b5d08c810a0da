"""Checkpoints that a killed training continues from, complete or ignored.

The Trainer writes a checkpoint's files one after the other, so a kill may leave any part of them. Here a
manifest with every file's SHA-256 is written last; a folder without a fitting manifest does not count.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, Trainer

from ..runs import sync, write_json

MANIFEST = "manifest.json"
KEPT = 2  # complete checkpoints: the newest, and the one before it should a disk spoil the newest


class CheckpointError(ValueError):
    """A checkpoint that belongs to another training, or whose weights do not fit the model."""


def write_manifest(folder: Path, **facts: Any) -> None:
    """Declare `folder` complete: sync its files, then write their sizes and SHA-256 sums with `facts`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    sums = {}
    for path in files:
        sync(path)
        sums[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync(path)
    write_json(folder / MANIFEST, {**facts, "files": sums})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete folder; None where it is missing, or a file is missing, cut or changed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        files = manifest["files"].items()
        # Sizes first: a cut file is found without reading gigabytes.
        whole = all((folder / name).stat().st_size == entry["bytes"] for name, entry in files)
        whole = whole and all(sha256(folder / name) == entry["sha256"] for name, entry in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole and files else None


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_folders(folder: Path) -> list[Path]:
    """`checkpoint-STEP` folders in `folder`, complete or not, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def newest_complete(folder: Path, identity: dict[str, Any]) -> Path | None:
    """The newest complete checkpoint in `folder`, None without one; broken ones newer than it are removed.

    `identity` says what is trained on what; `CheckpointError` where the checkpoint's differs.
    """
    for path in checkpoint_folders(folder):
        manifest = read_manifest(path)
        if manifest is None:
            shutil.rmtree(path)
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


def keep_newest(folder: Path, kept: int = KEPT) -> None:
    """Remove all but the `kept` newest checkpoints, each manifest first: no half of one must look whole."""
    for path in checkpoint_folders(folder)[kept:]:
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
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


class ResumableTrainer(Trainer):
    """A `Trainer` whose checkpoints are complete or ignored and restore every weight.

    `identity` goes into each manifest: what is trained on what.
    """

    def __init__(self, *args: Any, identity: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.identity = identity or {}

    def train(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As `Trainer.train`; `resume_from_checkpoint=True` means the newest complete checkpoint, if any."""
        if kwargs.get("resume_from_checkpoint") is True:
            newest = newest_complete(Path(str(self.args.output_dir)), self.identity)
            kwargs["resume_from_checkpoint"] = str(newest) if newest else None
        return super().train(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # what a kill left must not mix with this one
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(folder, step=self.state.global_step, identity=self.identity)
            keep_newest(folder.parent)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Restore the weights. The stock method loads a multimodal model's file under the names it has on
        disk, which are not those in memory, and restores nothing; `from_pretrained` knows both."""
        target: Any = self.model if model is None else model
        if isinstance(target, PeftModel) or not isinstance(target, PreTrainedModel):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        kind: Any = type(target)
        restored, report = kind.from_pretrained(
            resume_from_checkpoint, dtype=target.dtype, output_loading_info=True
        )
        lost = {kind: keys for kind, keys in report.items() if kind.endswith("_keys") and keys}
        if lost:
            raise CheckpointError(f"{resume_from_checkpoint} does not hold this model's weights: {lost}")
        with torch.no_grad():
            target.load_state_dict(restored.state_dict(), strict=True)
