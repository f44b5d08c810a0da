"""One forward of a decoder stack in which some layer lacks rows.

It carries the hidden states from stage to stage, and selects for each layer the alive rows of the arguments
that the stock stack passes to it: masks, rotary tables, positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepinsert.backbones.compat.transformers import CACHE_ARGUMENTS
from deepinsert.backbones.errors import UnsupportedModelError

from .cache import KeyMap, LayerKeys
from .masks import Columns, row_mask, select_mask
from .rows import Rows, Stages

_ROW_DIMENSION = {
    "position_embeddings": -2,
    "per_layer_input": -2,
    "position_ids": -1,
    "token_type_ids": -1,
    "mm_token_type_ids": -1,
    "moe_mm_token_type_ids": -1,
}
"""The dimension of the rows in the arguments that a stack passes to its layers."""

_ROWLESS = frozenset({*CACHE_ARGUMENTS, "num_items_in_batch", "labels"})
"""Arguments of layers that are not read row by row."""

Value = TypeVar("Value")


def _holds_tensor(value: Any) -> bool:
    """Whether an argument is a tensor, or a tuple or list that holds one."""
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(map(_holds_tensor, value)))


def _take(rows: Rows, value: Any, dim: int) -> Any:
    """Return the alive rows of a tensor, or of each tensor of a tuple such as (cos, sin)."""
    if isinstance(value, tuple | list):
        return type(value)(_take(rows, part, dim) for part in value)
    return rows.take(value, dim)


def _packed_positions(rows: Rows, value: Tensor) -> Tensor:
    """Return the index (1, R) of each alive row within its packed sequence.

    `value` (1, S) are the position ids, which restart in each sequence. A flash kernel looks for the first
    position of a sequence, and the row of this position may still be waiting.
    """
    sequence = rows.take((value == value.min()).cumsum(-1), -1)
    place = torch.arange(sequence.shape[-1], device=value.device).expand_as(sequence)
    starts = torch.ones_like(sequence, dtype=torch.bool)
    starts[..., 1:] = sequence[..., 1:] != sequence[..., :-1]
    return place - (place * starts).cummax(-1).values


@dataclass
class Forward:
    """One forward of the stack in which some layer lacks rows.

    Args:
        length: The number S of new positions.
        stages: The rows alive from each insert layer of the batch, and from layer 0, on.
        flash: Whether the attention kernel takes only 2-D masks.
        causal: Whether a mask of None means causal attention; in an encoder every row attends to every other.
        adds_between_layers: Whether the stack adds to the hidden states between layers (DeepStack). Then it
            gets them at full length after each layer, and what it adds to a waiting row stays there.
        plan: Makes the stages from the input of layer 0, if the stack embeds the ids itself.
        first_input: (B, S, D) input of layer 0, or (A, B, S, D) in a model with A streams; waiting rows are
            inserted from it.
        rows: The rows that the hidden states hold now; None means all.
        memo: Results that several layers share, with the objects whose ids are in their keys.
    """

    length: int
    stages: Stages
    flash: bool
    causal: bool = True
    adds_between_layers: bool = False
    plan: Callable[[Tensor], Stages] | None = None
    first_input: Tensor | None = None
    rows: Rows | None = None
    memo: dict[tuple[object, ...], tuple[object, Any]] = field(default_factory=dict)

    def enter(self, layer_idx: int, hidden: Tensor) -> Tensor:
        """Return the input (B, R, D) of layer `layer_idx`, from the hidden states behind the layer before."""
        if layer_idx == 0 and self.plan is not None:
            self.stages = self.plan(hidden)
        if layer_idx == 0 or self.adds_between_layers:
            self.first_input = hidden
        elif layer_idx in self.stages:
            hidden = self.put_back(hidden)
        elif self.rows is not None:
            return hidden
        self.rows = self.stages.get(layer_idx, self.rows)
        return hidden if self.rows is None else self.rows.take(hidden, -2)

    @property
    def decodes(self) -> bool:
        """Whether this is one new token that skips no layer."""
        return self.length == 1 and not self.stages and self.plan is None

    def has_all_rows(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` gets all rows."""
        return self.plan is None and self.stages.get(layer_idx, self.rows) is None

    def put_back(self, hidden: Tensor) -> Tensor:
        """Return the hidden states at full length (B, S, D), with waiting rows as they entered layer 0."""
        assert self.first_input is not None
        if self.rows is None:
            return hidden
        return self.rows.put(hidden.to(self.first_input.device), self.first_input)

    def full_length(self, states: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
        """Return the stack's `hidden_states`, each at full length: a waiting row is as it entered layer 0."""
        last = len(states) - 1
        for index, state in enumerate(states):
            below = [layer for layer in self.stages if layer <= max(index - 1, 0)]
            rows = self.stages[max(below)] if below else None
            is_shorter = state is not None and rows is not None and state.shape[-2] < self.length
            if state is None or rows is None or not is_shorter or self.first_input is None or index == last:
                yield state
            else:
                yield rows.put(state, self.first_input)

    def once(self, key: tuple[object, ...], objects: object, make: Callable[[], Value]) -> Value:
        """Return `make()`, which runs once per `key`.

        A key holds ids of objects. `objects` are kept alive, so that no other object gets their ids.
        """
        if key not in self.memo:
            self.memo[key] = (objects, make())
        value: Value = self.memo[key][1]
        return value

    def columns(self, keys: LayerKeys, hidden: Tensor) -> Columns:
        """Return the keys that a layer's attention will read; layers with equal caches share the result."""
        rows, length, past = self.rows, self.length, keys.past

        def make() -> Columns:
            if rows is None:
                new_positions = torch.arange(past, past + length, device=hidden.device)
                new_positions = new_positions.expand(hidden.shape[-3], -1)
            else:
                new_positions = past + rows.index
                new_positions = new_positions.masked_fill(~rows.valid, -1) if rows.ragged else new_positions
            positions = keys.columns(new_positions)
            first_new = keys.first_new_column(new_positions.shape[1], positions.shape[1])
            has_holes = keys.has_holes or (rows is not None and rows.ragged)
            return Columns(positions, first_new, keys.offset, has_holes)

        return self.once(("columns", id(rows), *keys.identity), (rows, keys.layer), make)

    def keymap(self, columns: Columns, past: int) -> KeyMap:
        """Return the key map that cache layers with these columns store: one object for all of them."""
        skipped = past + self.length - columns.positions.shape[1]
        make = partial(KeyMap, columns.positions, skipped, columns.has_holes)
        return self.once(("keymap", id(columns)), columns, make)

    def select(self, arguments: dict[str, Any], columns: Columns, recurrent: bool) -> dict[str, Any]:
        """Return a layer's arguments for the alive rows; a run of layers shares each selection.

        Args:
            arguments: The layer's arguments by name, for all rows.
            columns: The keys that the layer's attention will read.
            recurrent: Whether the layer is recurrent, so that its mask has a column per row and not per key.

        Raises:
            UnsupportedModelError: It is unknown how to select the rows of some tensor.
        """
        rows = self.rows
        selected = dict(arguments)
        for name, value in arguments.items():
            make: Callable[[], Any]
            if name == "attention_mask" and recurrent:
                make = partial(row_mask, value, rows)
                selected[name] = self.once(("rows", id(value), id(rows)), (value, rows), make)
            elif name == "attention_mask":
                make = partial(select_mask, value, rows, self.length, columns, self.flash, self.causal)
                selected[name] = self.once(("mask", id(value), id(columns)), (value, columns), make)
            elif rows is None or not _holds_tensor(value) or name in _ROWLESS:
                continue
            elif name == "cache_position":
                # Up to 5.3, layers get it to write into static caches or to scale far positions, which are
                # both refused when rows are left out. Only its length must be that of the rows.
                selected[name] = value[rows.read_index[0]]
            elif name == "position_ids" and self.flash and value.ndim == 2 and len(value) == 1:
                make = partial(_packed_positions, rows, value)
                selected[name] = self.once((name, id(value), id(rows)), (value, rows), make)
            elif name in _ROW_DIMENSION:
                make = partial(_take, rows, value, _ROW_DIMENSION[name])
                selected[name] = self.once((name, id(value), id(rows)), (value, rows), make)
            else:
                raise UnsupportedModelError(
                    f"this model passes {name!r} to its decoder layers, and its rows cannot be selected yet"
                )
        return selected
