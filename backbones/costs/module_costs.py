"""What one transformer layer costs, read off its modules: FLOPs by row and by pair of rows, bytes moved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
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


@dataclass(frozen=True)
class LayerTraffic:
    """What a layer moves through memory, besides the KV cache."""

    weight_bytes: int
    """Weights that every row uses."""
    expert_bytes: int
    """All routed experts together."""
    experts: int
    visited: int
    """Experts that one row visits."""
    row_width: int
    """Numbers that the weight matrices read and write for one row."""
    attention_width: int
    """Numbers of queries and of attention's output for one row."""

    def weights_read(self, rows: int) -> float:
        """Bytes of weights that a call over `rows` rows reads, experts as if they were visited evenly."""
        if not self.experts:
            return float(self.weight_bytes)
        missed = (1 - self.visited / self.experts) ** rows
        return self.weight_bytes + self.expert_bytes * (1 - missed)


def row_cost(layer: nn.Module) -> RowCost:
    """Cost of one transformer layer, from its linear modules, experts and attention heads."""
    return RowCost(linear_flops([layer]), sum(_attention_flops(module) for module in layer.modules()))


def layer_traffic(layer: nn.Module) -> LayerTraffic:
    """Weights and activations of one decoder layer."""
    matrices = list(_matrices(layer))
    heads = [found for found in map(attention_heads, layer.modules()) if found is not None]
    experts = [matrix for matrix in matrices if matrix.experts]
    expert_bytes = sum(matrix.weight.nbytes for matrix in experts)
    return LayerTraffic(
        weight_bytes=weight_bytes([layer]) - expert_bytes,
        expert_bytes=expert_bytes,
        experts=max((matrix.experts for matrix in experts), default=0),
        visited=max((matrix.visited for matrix in experts), default=0),
        row_width=sum((matrix.rows + matrix.columns) * matrix.visited for matrix in matrices),
        attention_width=sum(number * (key + value) for number, key, value in heads),
    )


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of all weights in `modules`; a weight that several share counts once."""
    weights = {id(weight): weight for module in modules for weight in module.parameters()}
    return sum(weight.nbytes for weight in weights.values())


def linear_flops(modules: Iterable[nn.Module]) -> int:
    """FLOPs for one row of every weight matrix in `modules`, each applied once; of experts, those visited."""
    return sum(
        2 * matrix.rows * matrix.columns * matrix.visited
        for module in modules
        for matrix in _matrices(module)
    )


def convolution_flops(module: Any, positions: int) -> int:
    """FLOPs of one convolution that gives `positions` output positions."""
    return 2 * math.prod(module.weight.shape) * positions


@dataclass(frozen=True)
class _Matrix:
    weight: Any
    rows: int
    columns: int
    visited: int = 1
    """How often one row is multiplied with it; of stacked experts, how many of them a row visits."""
    experts: int = 0


def _matrices(outer: nn.Module) -> Iterator[_Matrix]:
    """The weight matrices of a module's linear modules, routers and experts."""
    module: Any
    for module in outer.modules():
        if isinstance(module, nn.Linear):
            yield _Matrix(module.weight, module.in_features, module.out_features)
        elif type(module).__name__ == "Conv1D":  # transformers' transposed linear
            yield _Matrix(module.weight, *module.weight.shape)
        elif isinstance(getattr(module, "num_experts", None), int):
            yield from _expert_matrices(module, outer)


def _expert_matrices(module: Any, outer: nn.Module) -> Iterator[_Matrix]:
    """Of a module that keeps its experts' matrices stacked, or the router's matrix by itself."""
    for weight in module.parameters(recurse=False):
        if weight.shape[0] != module.num_experts:
            continue
        if weight.dim() == 3:
            visited = _visited_experts(module, outer)
            _, rows, columns = weight.shape
            yield _Matrix(weight, rows, columns, visited, module.num_experts)
        elif weight.dim() == 2 and hasattr(module, "top_k"):
            yield _Matrix(weight, weight.shape[1], weight.shape[0])


def _visited_experts(module: Any, outer: nn.Module) -> int:
    """Experts that a row visits, as the module, its router or its configuration says; else all of them."""
    named = [getattr(part, "top_k", None) for part in (module, *outer.modules())]
    named.append(getattr(getattr(module, "config", None), "num_experts_per_tok", None))
    return next((count for count in named if isinstance(count, int)), module.num_experts)


def _attention_flops(module: nn.Module) -> int:
    """FLOPs for one pair of rows of q·k and of the weighted sum of v, over all heads."""
    heads = attention_heads(module)
    if heads is None:
        return 0
    number, key_width, value_width = heads
    return 2 * number * (key_width + value_width)


def attention_heads(module: Any) -> tuple[int, int, int] | None:
    """Query heads, width of a key and width of a value of an attention module; None for other modules."""
    widths = (getattr(module, name, None) for name in ("qk_head_dim", "head_dim", "attention_head_size"))
    key_width = next((width for width in widths if isinstance(width, int)), None)
    projections = ("q_proj", "qkv", "qkv_proj", "q_b_proj", "query")
    if key_width is None or not any(hasattr(module, name) for name in projections):
        return None
    numbers = (getattr(module, name, None) for name in ("num_heads", "num_attention_heads"))
    number = next((count for count in numbers if isinstance(count, int)), None)
    if number is None:
        number = module.config.num_attention_heads
    return number, key_width, getattr(module, "v_head_dim", None) or key_width


def key_value_width(layer: nn.Module) -> int:
    """Numbers that a decoder layer caches for one token: keys plus values over the key-value heads."""
    for module in layer.modules():
        heads = attention_heads(module)
        if heads is not None:
            number, key_width, value_width = heads
            key: Any = getattr(module, "k_proj", None)
            if hasattr(key, "out_features"):
                value: Any = getattr(module, "v_proj", None)
                return key.out_features + getattr(value, "out_features", key.out_features)
            config = getattr(module, "config", None)
            grouped = getattr(module, "num_key_value_heads", None)
            grouped = grouped or getattr(config, "num_key_value_heads", None) or number
            return grouped * (key_width + value_width)
    return 0
