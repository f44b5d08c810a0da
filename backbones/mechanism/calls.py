"""Replaces the `__call__` of a model's modules, and holds small functions for what happens around a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from deepinsert.backbones.compat.transformers import cache_in

from .cache import is_short_static
from .static_cache import hide_holes

ATTRIBUTE = "_deepinsert"
"""The attribute of a module that holds the insertion which its calls go through."""

StockCall = Callable[..., Any]
"""The stock `__call__` of a decoder stack or a decoder layer, bound to its module."""

Arguments = dict[str, Any]
"""The arguments of a call by name."""


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch does not annotate it
def call_outside_graph(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function` eagerly, also from compiled code."""
    return function(*args)


def one_per_row(layers: Sequence[int], batch: int) -> list[int]:
    """Return one insert layer for each of `batch` rows; each layer is repeated for the rows it stands for.

    Generation repeats rows (beams, several samples), and a repeated row keeps its layer. Raises `ValueError`
    if the number of rows is no multiple of the number of layers.
    """
    if batch % len(layers):
        raise ValueError(f"{len(layers)} insert layers for a batch of {batch} rows: give one, or one per row")
    return [layer for layer in layers for _ in range(batch // len(layers))]


def map_hidden(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to the hidden states of a decoder layer's output: a tensor, or a tuple's first item."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def call_on_static_cache(index: int, stock: StockCall, call: Arguments, length: int) -> Any:
    """Call decoder layer `index` with all `length` new rows, on a static cache that may have holes."""
    past = cache_in(call)
    if is_short_static(past, index):
        call["attention_mask"] = hide_holes(past.layers[index], call.get("attention_mask"), length)
    return stock(**call)


@cache
def class_with_call(stock_class: Any, method: str) -> type[nn.Module]:
    """Return a subclass of `stock_class` whose `__call__` goes through the insertion's `method`.

    It has the name of `stock_class` and no further parameters. Unlike a forward hook, `__call__` does not run
    again when gradient checkpointing recomputes a layer.
    """

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        value = getattr(module, ATTRIBUTE)
        insertion, position = value if isinstance(value, tuple) else (value, ())
        return getattr(insertion, method)(*position, partial(stock_class.__call__, module), args, kwargs)

    members = {"__call__": call, "__module__": stock_class.__module__, "_stock_class": stock_class}
    return type(stock_class.__name__, (stock_class,), members | {"__qualname__": stock_class.__qualname__})
