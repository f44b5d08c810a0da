"""The `Trainer` of `transformers` with stable names for the methods that finetuning overrides.

The stock class has no public method for the order of prompts, for what is saved and for how weights are
restored. Its private ones are overridden here and nowhere else.
"""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainingArguments
from transformers.integrations import integration_utils

SEAMS = ("_get_train_sampler", "_save_checkpoint", "_load_from_checkpoint", "get_batch_samples")
"""Methods of `Trainer` that are overridden here. All exist since 4.57 or earlier; only the last is public."""

RNG_STATE = "rng_state{process}.pth"
"""The last file of a checkpoint before the manifest that each process writes; of several processes, `process`
is `_0`, `_1`, ..."""


class SeamTrainer(Trainer):
    """A `Trainer` whose subclasses may override `train_sampler`, `save_checkpoint` and `load_weights`.

    Raises `ImportError` under a version of `transformers` whose `Trainer` lacks one of the methods in
    `SEAMS`, because the override would never be called.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        absent = [name for name in SEAMS if not hasattr(Trainer, name)]
        if absent:
            raise ImportError(
                f"the Trainer of transformers {transformers.__version__} has no {' and no '.join(absent)}, "
                "without which no checkpoint would be complete: install a version listed in docs/versions.md"
            )
        super().__init__(*args, **kwargs)
        # The Trainer divides losses by the accumulated steps; in 5.3 and 5.4, accelerate divides them again.
        self.accelerator.gradient_accumulation_steps = 1

    def train_sampler(self, dataset: Dataset[Any] | None) -> Sampler[int] | None:
        """Return the order in which the rows of `dataset` are trained on."""
        return super()._get_train_sampler(dataset)

    def save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write `checkpoint-STEP` below `args.output_dir`."""
        super()._save_checkpoint(model, trial)

    def load_weights(self, checkpoint: str, model: nn.Module | None) -> None:
        """Load the weights in the folder `checkpoint` into `model`, by default the trainer's."""
        super()._load_from_checkpoint(checkpoint, model)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the stock method's batches, or none once all steps are done.

        Without this, a run that resumes from the checkpoint of its last step would train one step too many.
        """
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


def recomputation_arguments(enabled: bool) -> dict[str, Any]:
    """Return the arguments of `TrainingArguments` that recompute activations in the backward pass.

    The argument is `gradient_checkpointing` up to 5.22 and `activation_checkpointing` since.
    """
    parameters = inspect.signature(TrainingArguments).parameters
    name = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in parameters)
    return {name: enabled, f"{name}_kwargs": {"use_reentrant": False}}


def use_one_device(arguments: TrainingArguments) -> None:
    """Keep the Trainer from splitting each batch over all visible GPUs (DataParallel).

    It has no argument for that; the count is private in every version.
    """
    arguments._n_gpu = 1


def supported_reporters() -> frozenset[str]:
    """Return the names that `report_to` accepts."""
    return frozenset(integration_utils.INTEGRATION_TO_CALLBACK)


def installed_reporters() -> frozenset[str]:
    """Return the names among `supported_reporters` whose packages are installed."""
    available_integrations: Any = integration_utils.get_available_reporting_integrations
    return frozenset(available_integrations())
