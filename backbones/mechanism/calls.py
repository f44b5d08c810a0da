"""Calls that are replaced on a model's modules, and what the mechanism does around one.

A module's `__call__` is replaced by giving the instance a subclass of its class with the same name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from deepinsert.backbones.compat.transformers import cache_in

from .cache import is_short_static
from .static_cache import hide_holes

ATTRIBUTE = "_deepinsert"
"""Where a module keeps the insertion that its calls go through."""


class EmbeddingHook:
    """Hook on the input embeddings. Where they alone are copied, as PEFT does (`modules_to_save`), the copy
    reports to the same insertion; where the model is copied, to the model's own."""

    def __init__(self, insertion: Any) -> None:
        self.insertion = insertion

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.insertion.saw_embedding(module, args, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> EmbeddingHook:
        whole = id(self.insertion.entrance) in memo or id(self.insertion.stack) in memo
        return EmbeddingHook(copy.deepcopy(self.insertion, memo) if whole else self.insertion)


@torch.compiler.disable
def outside_the_graph(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def one_per_row(layers: Sequence[int], batch: int) -> list[int]:
    """One insert layer for each row of the batch; rows that generation repeats take theirs along."""
    if batch % len(layers):
        raise ValueError(f"{len(layers)} insert layers for a batch of {batch} rows: give one, or one per row")
    return [layer for layer in layers for _ in range(batch // len(layers))]


def map_hidden(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A decoder layer's output, a tensor or a tuple that starts with one, with `change` applied to it."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def on_static_cache(index: int, stock: Callable[..., Any], call: dict[str, Any], length: int) -> Any:
    """A layer called with all its rows, whose static cache may have holes."""
    past = cache_in(call)
    if is_short_static(past, index):
        call["attention_mask"] = hide_holes(past.layers[index], call.get("attention_mask"), length)
    return stock(**call)


@cache
def called_through(stock_class: Any, through: str) -> type[nn.Module]:
    """`stock_class` with a `__call__` that goes through the insertion; same name, no new parameter."""

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = getattr(module, ATTRIBUTE)
        insertion, place = found if isinstance(found, tuple) else (found, ())
        return getattr(insertion, through)(*place, partial(stock_class.__call__, module), args, kwargs)

    members = {"__call__": call, "__module__": stock_class.__module__, "_stock_class": stock_class}
    return type(stock_class.__name__, (stock_class,), members | {"__qualname__": stock_class.__qualname__})
