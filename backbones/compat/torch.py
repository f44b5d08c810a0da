"""Functions of torch beyond its documented interface, or that only newer versions have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

_REDUCES_UNUSED = "set_reduce_scatter_unused_params"
"""A method of `FSDPModule` since 2.13."""


def can_reduce_unused() -> bool:
    """Whether FSDP can reduce the gradients of weights that a process did not use, as zeros."""
    return hasattr(FSDPModule, _REDUCES_UNUSED)


def reduce_unused(model: nn.Module) -> None:
    """Make every module of `model` that FSDP wraps reduce the gradients of unused weights, as zeros."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            getattr(module, _REDUCES_UNUSED)(True)


def mark_static_address(buffer: Tensor) -> None:
    """Mark `buffer` as staying at its address, for compiled code.

    The function is in `torch._dynamo`, where transformers uses it too (2.1 to 2.15).
    """
    dynamo: Any = torch._dynamo
    dynamo.mark_static_address(buffer)
