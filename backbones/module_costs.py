"""FLOPs of one transformer layer, read off its modules: what each row costs, and what each pair of rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class RowCost:
    """FLOPs of a layer over n rows: `per_row * n` for weights, `per_pair * n²` for attention."""

    per_row: int
    per_pair: int = 0

    def flops(self, rows: int, span: int | None = None) -> int:
        """FLOPs over `rows` rows that each attend to `span` rows, by default to all of them."""
        return rows * (self.per_row + self.per_pair * (rows if span is None else span))


def row_cost(layer: nn.Module) -> RowCost:
    """Cost of one transformer layer, from its linear modules, experts and attention heads."""
    return RowCost(linear_flops([layer]), sum(_attention_flops(module) for module in layer.modules()))


def linear_flops(modules: Iterable[nn.Module]) -> int:
    """FLOPs for one row of every weight matrix in `modules`, each applied once."""
    total = 0
    module: Any
    for module in (inner for outer in modules for inner in outer.modules()):
        if isinstance(module, nn.Linear):
            total += 2 * module.in_features * module.out_features
        elif type(module).__name__ == "Conv1D":  # transformers' transposed linear
            total += 2 * math.prod(module.weight.shape)
        else:
            total += _expert_flops(module)
    return total


def convolution_flops(module: Any, positions: int) -> int:
    """FLOPs of one convolution that gives `positions` output positions."""
    return 2 * math.prod(module.weight.shape) * positions


def _expert_flops(module: nn.Module) -> int:
    """A module that keeps its experts' matrices stacked: one row visits `num_experts_per_tok` of them."""
    stacked = [weight for weight in module.parameters(recurse=False) if weight.dim() == 3]
    experts = getattr(module, "num_experts", None)
    if not stacked or not isinstance(experts, int):
        return 0
    config = getattr(module, "config", None)
    visited = getattr(module, "top_k", None) or getattr(config, "num_experts_per_tok", None) or experts
    return sum(2 * weight.numel() // experts * visited for weight in stacked if weight.shape[0] == experts)


def _attention_flops(module: nn.Module) -> int:
    """FLOPs for one pair of rows of q·k and of the weighted sum of v, over all heads."""
    heads = attention_heads(module)
    if heads is None:
        return 0
    number, key_width, value_width = heads
    return 2 * number * (key_width + value_width)


def attention_heads(module: Any) -> tuple[int, int, int] | None:
    """Query heads, width of a key and width of a value of an attention module; None for other modules."""
    key_width = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None)
    projections = ("q_proj", "qkv", "qkv_proj", "q_b_proj", "query")
    if not isinstance(key_width, int) or not any(hasattr(module, name) for name in projections):
        return None
    number = getattr(module, "num_heads", None)
    if number is None:
        number = module.config.num_attention_heads
    return number, key_width, getattr(module, "v_head_dim", None) or key_width


def key_value_width(layer: nn.Module) -> int:
    """Numbers that a decoder layer caches for one token: keys plus values over the key-value heads."""
    for module in layer.modules():
        heads = attention_heads(module)
        if heads is not None:
            number, key_width, value_width = heads
            config = getattr(module, "config", None)
            grouped = getattr(module, "num_key_value_heads", None)
            grouped = grouped or getattr(config, "num_key_value_heads", None) or number
            return grouped * (key_width + value_width)
    return 0
