"""Costs of one transformer layer, read from its modules: FLOPs per row and per pair of rows, bytes moved."""

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
        """Return the FLOPs over `rows` rows that each attend to `span` rows, by default to all of them."""
        return rows * (self.per_row + self.per_pair * (rows if span is None else span))


@dataclass(frozen=True)
class LayerTraffic:
    """Bytes and numbers that a layer moves through memory, besides the KV cache."""

    weight_bytes: int
    """Bytes of the weights that every row uses."""
    expert_bytes: int
    """Bytes of all routed experts together."""
    experts: int
    """Number of routed experts; 0 in a dense layer."""
    experts_per_row: int
    """Number of experts that one row visits."""
    row_width: int
    """Numbers that the weight matrices read and write per row."""
    attention_width: int
    """Numbers in the queries and in the output of attention per row."""

    def weights_read(self, rows: int) -> float:
        """Return the bytes of weights that a call over `rows` rows reads, if rows visit experts evenly."""
        if not self.experts:
            return float(self.weight_bytes)
        unvisited_share = (1 - self.experts_per_row / self.experts) ** rows
        return self.weight_bytes + self.expert_bytes * (1 - unvisited_share)


def row_cost(layer: nn.Module) -> RowCost:
    """Count one transformer layer from its linear modules, experts and attention heads."""
    return RowCost(linear_flops([layer]), sum(_attention_flops(module) for module in layer.modules()))


def layer_traffic(layer: nn.Module) -> LayerTraffic:
    """Count the weights and activations of one decoder layer."""
    matrices = list(_matrices(layer))
    heads = [shape for shape in map(attention_heads, layer.modules()) if shape is not None]
    experts = [matrix for matrix in matrices if matrix.experts]
    expert_bytes = sum(matrix.weight.nbytes for matrix in experts)
    return LayerTraffic(
        weight_bytes=weight_bytes([layer]) - expert_bytes,
        expert_bytes=expert_bytes,
        experts=max((matrix.experts for matrix in experts), default=0),
        experts_per_row=max((matrix.uses_per_row for matrix in experts), default=0),
        row_width=sum((matrix.rows + matrix.columns) * matrix.uses_per_row for matrix in matrices),
        attention_width=sum(number * (key + value) for number, key, value in heads),
    )


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Return the bytes of all weights in `modules`; a weight that several modules share counts once."""
    weights = {id(weight): weight for module in modules for weight in module.parameters()}
    return sum(weight.nbytes for weight in weights.values())


def linear_flops(modules: Iterable[nn.Module]) -> int:
    """Return the FLOPs per row of every weight matrix in `modules`, each applied once.

    Of the experts, only those that a row visits count.
    """
    return sum(
        2 * matrix.rows * matrix.columns * matrix.uses_per_row
        for module in modules
        for matrix in _matrices(module)
    )


def convolution_flops(module: Any, positions: int) -> int:
    """Return the FLOPs of one convolution with `positions` output positions."""
    weights: int = math.prod(module.weight.shape)
    return 2 * weights * positions


@dataclass(frozen=True)
class _Matrix:
    """A weight matrix of shape (rows, columns), or a stack of experts' matrices of that shape."""

    weight: Any
    rows: int
    columns: int
    uses_per_row: int = 1
    """How many products one row makes with it: of stacked experts, the number that a row visits."""
    experts: int = 0


def _matrices(outer: nn.Module) -> Iterator[_Matrix]:
    """Yield the weight matrices of a module's linear modules, routers and experts."""
    module: Any
    for module in outer.modules():
        if isinstance(module, nn.Linear):
            yield _Matrix(module.weight, module.in_features, module.out_features)
        elif type(module).__name__ == "Conv1D":  # transformers' linear module with a transposed weight
            yield _Matrix(module.weight, *module.weight.shape)
        elif isinstance(getattr(module, "num_experts", None), int):
            yield from _expert_matrices(module, outer)


def _expert_matrices(module: Any, outer: nn.Module) -> Iterator[_Matrix]:
    """Yield the stacked matrices of a module that holds experts, or the router's own matrix."""
    for weight in module.parameters(recurse=False):
        if weight.shape[0] != module.num_experts:
            continue
        if weight.dim() == 3:
            _, rows, columns = weight.shape
            yield _Matrix(weight, rows, columns, _experts_per_row(module, outer), module.num_experts)
        elif weight.dim() == 2 and hasattr(module, "top_k"):
            yield _Matrix(weight, weight.shape[1], weight.shape[0])


def _experts_per_row(module: Any, outer: nn.Module) -> int:
    """Return how many experts a row visits by the module, its router or its configuration; else all."""
    counts = [getattr(part, "top_k", None) for part in (module, *outer.modules())]
    counts.append(getattr(getattr(module, "config", None), "num_experts_per_tok", None))
    return next((count for count in counts if isinstance(count, int)), int(module.num_experts))


def _attention_flops(module: nn.Module) -> int:
    """Return the FLOPs per pair of rows of q·k and of the weighted sum of v, over all heads."""
    heads = attention_heads(module)
    if heads is None:
        return 0
    number, key_width, value_width = heads
    return 2 * number * (key_width + value_width)


def attention_heads(module: Any) -> tuple[int, int, int] | None:
    """Return (query heads, width of a key, width of a value) of an attention module; None for others."""
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
    """Return how many numbers a decoder layer caches per token: keys and values of all key-value heads."""
    for module in layer.modules():
        heads = attention_heads(module)
        if heads is not None:
            return _cached_width(module, *heads)
    return 0


def _cached_width(attention: nn.Module, query_heads: int, key_width: int, value_width: int) -> int:
    """Return keys plus values per token of one attention module, whose heads may be grouped."""
    key: Any = getattr(attention, "k_proj", None)
    if hasattr(key, "out_features"):
        value: Any = getattr(attention, "v_proj", None)
        return int(key.out_features + getattr(value, "out_features", key.out_features))
    config = getattr(attention, "config", None)
    grouped: Any = getattr(attention, "num_key_value_heads", None)
    grouped = grouped or getattr(config, "num_key_value_heads", None) or query_heads
    return int(grouped * (key_width + value_width))
