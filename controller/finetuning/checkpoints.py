"""The folder of checkpoints from which a killed training continues.

The Trainer writes a checkpoint's files one after the other, so a kill may leave any part of them. A
manifest is therefore written last, and a checkpoint without a matching manifest is ignored.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from deepinsert.controller.runs.manifest import MANIFEST, CheckpointError, check_complete
from deepinsert.controller.runs.storage_errors import explain_storage_errors

TRAINING = "training"
"""The folder of the checkpoints in a run folder."""
KEPT_CHECKPOINTS = 2
"""The newest complete checkpoint, and the one before it in case the disk damages the newest."""

Result = TypeVar("Result")

logger = logging.getLogger("deepinsert")


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the folders `checkpoint-STEP` in `folder`, complete or not, the newest first."""
    paths = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(paths, key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def newest_complete(folder: Path, identity: dict[str, Any]) -> Path | None:
    """Return the newest complete checkpoint in `folder`, or None; newer checkpoints are removed.

    A warning names a removed checkpoint that was complete and is damaged now, but not one that a kill left
    unfinished. `identity` describes the training: the backbone, the data and the options that matter.

    Raises:
        CheckpointError: the checkpoint belongs to another training.
        OSError: a checkpoint cannot be read; its files may still be good, so it is not removed.
    """
    for path in checkpoint_folders(folder):
        try:
            manifest = check_complete(path)
        except CheckpointError as error:
            if (path / MANIFEST).exists():
                logger.warning("%s; continuing from the checkpoint before it", error)
            remove_checkpoint(path)
            continue
        checkpoint_identity = manifest.get("identity", {})
        changes = [name for name in identity if checkpoint_identity.get(name) != identity[name]]
        if changes:
            raise CheckpointError(
                f"{path} was written with another {' and '.join(changes)}: put back what the run started "
                "with, or choose another --out"
            )
        return path
    return None


def newest_name(folder: Path) -> str | None:
    """Return the name of the newest checkpoint in `folder` that has a manifest, without reading its files."""
    return next((path.name for path in checkpoint_folders(folder) if (path / MANIFEST).is_file()), None)


def keep_newest(folder: Path, count: int = KEPT_CHECKPOINTS) -> None:
    """Remove all checkpoints in `folder` but the `count` newest."""
    for path in checkpoint_folders(folder)[count:]:
        remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint. Its manifest goes first, so that a rest of it never looks complete."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def how_to_continue(training: Path) -> str:
    """Return what to do after a storage error, and the step from which the run will then continue."""
    newest = newest_name(training)
    start = f"step {newest.rpartition('-')[2]}, {training / newest} being complete" if newest else "the start"
    return (
        "Free space there or make it writable (or copy the folder elsewhere and name that as --out), then "
        f"give the same command again: it continues from {start}."
    )


def explains_how_to_continue(run: Callable[[Any], Result]) -> Callable[[Any], Result]:
    """Decorate a command's `run(options)`: its storage errors then say where the run will continue."""

    @wraps(run)
    def run_with_explanation(options: Any) -> Result:
        out = Path(options.out)
        with explain_storage_errors(out, lambda: how_to_continue(out / TRAINING)):
            return run(options)

    return run_with_explanation
