"""Attributes of accelerate's plugins, which are documented as arguments and not as attributes.

The names have not changed since 1.10, the oldest version that is supported.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def is_sharded(state: Any) -> bool:
    """Whether each process holds only a part of the weights and gathers a layer's to run it (FSDP, ZeRO-3).

    `state` is an `AcceleratorState`, here and below.
    """
    zero = getattr(state, "deepspeed_plugin", None)
    return uses_fsdp(state) or (zero is not None and zero.zero_stage == 3)


def uses_fsdp(state: Any) -> bool:
    """Whether FSDP holds the weights."""
    return getattr(state, "fsdp_plugin", None) is not None


def wrap_layers(state: Any, layers: nn.ModuleList) -> None:
    """Make FSDP wrap the classes of `layers`, unless the user has named other classes."""
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})
