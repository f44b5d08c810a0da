"""Checks whether prompts can share their prefix: in some models a row depends on more than earlier rows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deepinsert.backbones.compat.transformers import CACHE_ARGUMENTS, attention_of
from deepinsert.backbones.families import is_encoder_decoder

from .routing import Insertion

ROW_DIMENSION = {"inputs_embeds": -2, "position_ids": -1, "visual_pos_masks": -1}
"""The dimension of the rows in the arguments of a stack."""

ADDED_BETWEEN_LAYERS = ("visual_pos_masks", "deepstack_visual_embeds")
"""Arguments of a stack that adds features between its layers."""

REBUILT_ARGUMENTS = ("attention_mask", "cache_position", "use_cache", *CACHE_ARGUMENTS)
"""Arguments of a stack that are made again for the rows of a shared prefix."""

_ROPE_OF_LENGTH = {"dynamic", "longrope"}
"""Kinds of rotary positions that change with the prompt's length."""


class CannotShareError(ValueError):
    """Rows of the model depend on more than the rows before them; the message says on what."""


def check_can_share(model: Any, insertion: Insertion) -> None:
    """Raise `CannotShareError` if a row of the stack may depend on more than the rows before it."""
    stack, limits = insertion.stack, insertion.limits
    config = stack.config
    rope = getattr(config, "rope_parameters", None) or {}
    parameters = inspect.signature(type(model).forward).parameters.values()
    required = [
        each.name
        for each in list(parameters)[1:]
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD and each.name != "input_ids"
    ]
    reasons = {
        "it is an encoder-decoder": is_encoder_decoder(model),
        "its later layers share keys": limits.deepest < limits.num_layers,
        "its layers carry a state": any(limits.recurrent),
        "its attention scales with the number of a row": limits.farthest is not None,
        "its stack takes no position_ids": "position_ids" not in insertion.stack_arguments,
        "its layers see chunks, or choose their keys": bool(
            set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
        ),
        "its rotary positions change with the prompt's length": rope.get("rope_type") in _ROPE_OF_LENGTH,
        f"its attention is {attention_of(config)!r}, which takes no masks of 4 dimensions": (
            attention_of(config) not in ("sdpa", "eager")
        ),
        f"its forward needs {', '.join(required)} with every text": bool(required),
        "it is in training mode": model.training,
    }
    for reason, holds in reasons.items():
        if holds:
            raise CannotShareError(reason)


def check_arguments(call: Mapping[str, Any]) -> None:
    """Raise `CannotShareError` if the stack gets an argument whose rows are unknown."""
    mask = call.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise CannotShareError("it makes attention masks of its own")
    supported = {*ROW_DIMENSION, *ADDED_BETWEEN_LAYERS, *REBUILT_ARGUMENTS}
    for name, value in call.items():
        if name not in supported and (isinstance(value, Tensor | list | tuple | dict) and len(value)):
            raise CannotShareError(f"its stack gets {name!r}")
