"""What finetuning reads of accelerate's plugins, which are documented as arguments and not as attributes.

The names have been so since 1.10, the oldest version that is supported.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def is_sharded(state: Any) -> bool:
    """Whether processes hold parts of the weights each (FSDP, ZeRO-3) and gather a layer's to run it; `state`
    is an `AcceleratorState`."""
    zero = getattr(state, "deepspeed_plugin", None)
    return uses_fsdp(state) or (zero is not None and zero.zero_stage == 3)


def uses_fsdp(state: Any) -> bool:
    """Whether FSDP holds the weights."""
    return getattr(state, "fsdp_plugin", None) is not None


def wrap_layers(state: Any, layers: nn.ModuleList) -> None:
    """Have FSDP wrap the classes of `layers`, unless the user has named others."""
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})
