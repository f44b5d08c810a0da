"""A `Trainer` whose checkpoints are complete or ignored, and restore every weight."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from deepinsert.backbones.compat.accelerate import uses_fsdp
from deepinsert.backbones.compat.trainer import RNG_STATE, SeamTrainer
from deepinsert.controller.runs.manifest import CheckpointError, read_manifest, write_manifest
from deepinsert.controller.runs.storage_errors import explain_storage_errors

from .checkpoints import how_to_continue, keep_newest, newest_complete, remove_checkpoint

Decision = TypeVar("Decision")

logger = logging.getLogger("deepinsert")


class ResumableTrainer(SeamTrainer):
    """A `Trainer` that writes a manifest as the last file of each checkpoint and resumes from complete ones.

    A full or read-only disk is a `StorageError` that leaves the earlier checkpoints as they are.
    """

    def __init__(self, *args: Any, identity: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Accept the arguments of `transformers.Trainer`.

        `identity` describes the training (backbone, data, options that matter) and goes into each manifest.
        """
        super().__init__(*args, **kwargs)
        self.identity = identity or {}

    @property
    def training_folder(self) -> Path:
        """The folder of the checkpoints."""
        return Path(str(self.args.output_dir))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does.

        `resume_from_checkpoint=True` resumes from the newest complete checkpoint, if there is one. The first
        process chooses it for all.
        """
        if resume_from_checkpoint is True:
            is_first = self.args.process_index == 0
            resume_from_checkpoint = decide_in_first_process(self._newest_checkpoint, is_first)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _newest_checkpoint(self) -> str | None:
        """Return the newest complete checkpoint, with a warning if another number of processes wrote it."""
        newest = newest_complete(self.training_folder, self.identity)
        if newest is None:
            return None
        processes = read_manifest(newest).get("processes", 1)
        if processes != self.args.world_size:
            logger.warning(
                "%s was written by %s processes and is continued by %s: random numbers (dropout) will differ "
                "from those of an uninterrupted run",
                newest,
                processes,
                self.args.world_size,
            )
        return str(newest)

    def save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write `checkpoint-STEP` with its manifest, then remove the oldest checkpoints.

        Raises:
            StorageError: the disk is full or cannot be written; the unfinished checkpoint is removed.
        """
        folder = self.training_folder / f"checkpoint-{self.state.global_step}"
        try:
            with explain_storage_errors(folder, lambda: how_to_continue(self.training_folder)):
                if self.args.should_save:
                    remove_checkpoint(folder)  # files that a kill left must not mix with the new ones
                self.accelerator.wait_for_everyone()
                super().save_checkpoint(model, trial)
                # A failed process never gets here, so the manifest is written only if all have saved.
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._declare_complete(folder)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)  # frees its space
            raise
        if self.args.should_save:
            keep_newest(self.training_folder)

    def _declare_complete(self, folder: Path) -> None:
        """Write the manifest of a checkpoint after checking that every process has written to this folder."""
        processes = self.args.world_size
        ranks = [f"_{rank}" for rank in range(processes)] if processes > 1 else [""]
        absent = [name for rank in ranks if not (folder / (name := RNG_STATE.format(process=rank))).is_file()]
        if absent and not self.args.save_on_each_node:
            raise CheckpointError(
                f"{folder} has no {absent[0]}: --out must be a folder that all processes share"
            )
        write_manifest(folder, step=self.state.global_step, processes=processes, identity=self.identity)

    def load_weights(self, checkpoint: str, model: nn.Module | None) -> None:
        """Restore the weights of `checkpoint`.

        The stock method loads a multimodal model's file under the names on disk, which differ from those in
        memory, and so restores nothing; `from_pretrained` maps the names. The stock method restores adapters
        and weights that FSDP has sharded correctly.

        Raises:
            CheckpointError: the checkpoint does not hold exactly the model's weights.
        """
        target: Any = self.model if model is None else model
        sharded = uses_fsdp(self.accelerator.state)
        if isinstance(target, PeftModel) or not isinstance(target, PreTrainedModel) or sharded:
            return super().load_weights(checkpoint, model)
        model_class: Any = type(target)
        restored, report = model_class.from_pretrained(
            checkpoint, dtype=target.dtype, output_loading_info=True
        )
        problems = {name: keys for name, keys in report.items() if name.endswith("_keys") and keys}
        if problems:
            raise CheckpointError(f"{checkpoint} does not hold this model's weights: {problems}")
        with torch.no_grad():
            target.load_state_dict(restored.state_dict(), strict=True)


def decide_in_first_process(decide: Callable[[], Decision], is_first: bool) -> Decision:
    """Call `decide` in the first process and return its result in all of them.

    Every process must call this. A `ValueError` or `OSError` of `decide` is raised in all of them as well.
    """
    outcome: list[Any] = [None, None]
    if is_first:
        try:
            outcome[0] = decide()
        except (ValueError, OSError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    decision: Decision = outcome[0]
    return decision
