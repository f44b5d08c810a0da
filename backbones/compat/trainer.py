"""The `Trainer` of `transformers` with the seams that finetuning needs, under names that stay.

The stock class has no public method for the order of prompts, for what is saved and for how weights are
restored; the private ones it has are overridden here and nowhere else.
"""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

SEAMS = ("_get_train_sampler", "_save_checkpoint", "_load_from_checkpoint", "get_batch_samples")
"""Methods of `Trainer` that are overridden here; all since 4.57 at the latest. Only the last is public."""

RNG_STATE = "rng_state{process}.pth"
"""The file of a checkpoint that each process writes last but for the manifest; `_0`, `_1`, ... of several."""


class SeamTrainer(Trainer):
    """A `Trainer` whose subclasses may override `train_sampler`, `save_checkpoint` and `load_weights`.

    Raises `ImportError` under a version of `transformers` whose `Trainer` lacks one of the methods that those
    stand for: the override would be passed by in silence.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        absent = [name for name in SEAMS if not hasattr(Trainer, name)]
        if absent:
            raise ImportError(
                f"the Trainer of transformers {transformers.__version__} has no {' and no '.join(absent)}, "
                "without which no checkpoint would be complete: install a version listed in docs/versions.md"
            )
        super().__init__(*args, **kwargs)
        # The Trainer divides losses by the steps it accumulates; 5.3 and 5.4 have accelerate do it again.
        self.accelerator.gradient_accumulation_steps = 1

    def train_sampler(self, dataset: Dataset[Any] | None) -> Sampler[int] | None:
        """The order in which `dataset` is trained on."""
        return super()._get_train_sampler(dataset)

    def save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write `checkpoint-STEP` below `args.output_dir`."""
        super()._save_checkpoint(model, trial)

    def load_weights(self, checkpoint: str, model: nn.Module | None) -> None:
        """Give `model`, by default the trainer's, the weights in the folder `checkpoint`."""
        super()._load_from_checkpoint(checkpoint, model)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock method; nothing more once all steps are done. A training that goes on from the
        checkpoint of its last step would play one step too many."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        return self.train_sampler(self.train_dataset if train_dataset is None else train_dataset)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_weights(resume_from_checkpoint, model)


def recomputing(wanted: bool) -> dict[str, Any]:
    """Arguments of `TrainingArguments` that have activations computed again in the backward pass.

    Called `gradient_checkpointing` to 5.22 and `activation_checkpointing` since.
    """
    known = inspect.signature(TrainingArguments).parameters
    name = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in known)
    return {name: wanted, f"{name}_kwargs": {"use_reentrant": False}}


def drive_one_device(arguments: TrainingArguments) -> None:
    """Keep the Trainer from splitting each batch over every GPU in sight (DataParallel). It has no argument
    for that; the count is private in every version."""
    arguments._n_gpu = 1


def known_reporters() -> frozenset[str]:
    """Names that `report_to` takes."""
    return frozenset(INTEGRATION_TO_CALLBACK)


def installed_reporters() -> frozenset[str]:
    """Those of them whose packages are installed."""
    return frozenset(get_available_reporting_integrations())
