"""Behaviour of PEFT beyond its documented interface."""

from __future__ import annotations

import warnings
from typing import Any

from peft import PeftConfig, get_peft_model

CARD = "README.md"
"""File name of the model card that `PeftModel.save_pretrained` writes: an empty form, in every version."""


def add_adapter(model: Any, config: PeftConfig) -> Any:
    """Return `model` with an adapter; its modules are wrapped in place."""
    with warnings.catch_warnings():
        # Up to 0.21, PEFT reads an attribute of the model that transformers has begun to replace in 5.23.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        return get_peft_model(model, config)
