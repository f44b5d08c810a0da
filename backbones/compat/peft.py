"""What PEFT's adapters bring along beyond its documented interface."""

from __future__ import annotations

import warnings
from typing import Any

from peft import PeftConfig, get_peft_model

CARD = "README.md"
"""The card that `PeftModel.save_pretrained` writes: a form to fill in, in every version."""


def adapted(model: Any, config: PeftConfig) -> Any:
    """`model` with an adapter; the same modules, wrapped in place."""
    with warnings.catch_warnings():
        # To 0.21, PEFT asks the model by a name that transformers has begun to replace in 5.23.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        return get_peft_model(model, config)
