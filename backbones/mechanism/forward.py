"""One forward of a decoder stack in which some layer sees fewer rows than there are.

It carries the hidden states from stage to stage and selects, for each layer, the rows of what the stock
stack hands it: masks, rotary tables, positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deepinsert.backbones.compat.transformers import CACHE_ARGUMENTS
from deepinsert.backbones.errors import UnsupportedModelError

from .cache import KeyMap, LayerKeys
from .masks import Columns, row_mask, select_mask
from .rows import Rows

_ROW_DIMENSION = {
    "position_embeddings": -2,
    "per_layer_input": -2,
    "position_ids": -1,
    "token_type_ids": -1,
    "mm_token_type_ids": -1,
    "moe_mm_token_type_ids": -1,
}
"""Where the rows are in what a stack hands each layer."""

_ROWLESS = frozenset({*CACHE_ARGUMENTS, "num_items_in_batch", "labels"})
"""What reaches the layers but is not read row by row there."""


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(map(_holds_tensor, value)))


def _take(rows: Rows, value: Any, dim: int) -> Any:
    """The alive rows of a tensor, or of each tensor of a tuple such as (cos, sin)."""
    if isinstance(value, tuple | list):
        return type(value)(_take(rows, part, dim) for part in value)
    return rows.take(value, dim)


def _packed_positions(rows: Rows, value: Tensor) -> Tensor:
    """(1, R) places of the alive rows in the packed sequences that `value` (1, S) numbers, none left out.

    A flash kernel looks for a sequence's first position, which may be that of a row that waits.
    """
    sequence = rows.take((value == value.min()).cumsum(-1), -1)
    place = torch.arange(sequence.shape[-1], device=value.device).expand_as(sequence)
    starts = torch.ones_like(sequence, dtype=torch.bool)
    starts[..., 1:] = sequence[..., 1:] != sequence[..., :-1]
    return place - (place * starts).cummax(-1).values


@dataclass
class Forward:
    """One forward of the stack in which some layer sees fewer rows than there are.

    `stages` maps each insert layer of the batch, and 0, to the rows alive from there on; None means all.
    `causal` says what a mask of None means: in an encoder every row sees every other. `between` says that
    the stack itself adds to the hidden states between layers (DeepStack): it is then given them at full
    length after each layer, and what it adds to a waiting row stays on it.
    """

    length: int
    stages: dict[int, Rows | None]
    flash: bool
    causal: bool = True
    between: bool = False
    plan: Callable[[Tensor], dict[int, Rows | None]] | None = None
    """Makes the stages from the input of layer 0, where the stack embeds the ids itself."""
    entered: Tensor | None = None
    """(B, S, D) input of layer 0, kept for rows that have not been inserted yet; (A, B, S, D) where a model
    carries A streams."""
    rows: Rows | None = None
    """The rows that the hidden states now hold."""
    memo: dict[tuple, tuple] = field(default_factory=dict)

    def enter(self, layer_idx: int, hidden: Tensor) -> Tensor:
        """Hidden states (B, R, D) for layer `layer_idx` from what the layer before it returned."""
        if layer_idx == 0 and self.plan is not None:
            self.stages = self.plan(hidden)
        if layer_idx == 0 or self.between:
            self.entered = hidden
        elif layer_idx in self.stages:
            hidden = self.put_back(hidden)
        elif self.rows is not None:
            return hidden
        self.rows = self.stages.get(layer_idx, self.rows)
        return hidden if self.rows is None else self.rows.take(hidden, -2)

    @property
    def decodes(self) -> bool:
        """Whether this is one new token that skips nothing."""
        return self.length == 1 and not self.stages and self.plan is None

    def whole_at(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` is given all rows."""
        return self.plan is None and self.stages.get(layer_idx, self.rows) is None

    def put_back(self, hidden: Tensor) -> Tensor:
        """(B, S, D): hidden states at full length again."""
        assert self.entered is not None
        return hidden if self.rows is None else self.rows.put(hidden.to(self.entered.device), self.entered)

    def full_length(self, states: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
        """The stack's `hidden_states`, each at full length: a waiting row is as it entered layer 0."""
        last = len(states) - 1
        for index, state in enumerate(states):
            below = [layer for layer in self.stages if layer <= max(index - 1, 0)]
            rows = self.stages[max(below)] if below else None
            short = state is not None and rows is not None and state.shape[-2] < self.length
            if state is None or rows is None or not short or self.entered is None or index == last:
                yield state
            else:
                yield rows.put(state, self.entered)

    def once(self, key: tuple, kept: tuple, make: Callable[[], Any]) -> Any:
        """`make()`, once for each `key` of ids; `kept` holds what the ids name, so that none is reused."""
        if key not in self.memo:
            self.memo[key] = (kept, make())
        return self.memo[key][1]

    def columns(self, keys: LayerKeys, hidden: Tensor) -> Columns:
        """The keys that a layer's attention will see, made once for layers whose caches hold the same."""
        rows, length, past = self.rows, self.length, keys.past

        def make() -> Columns:
            if rows is None:
                new = torch.arange(past, past + length, device=hidden.device)
                new = new.expand(hidden.shape[-3], -1)
            else:
                new = (past + rows.index).masked_fill(~rows.valid, -1) if rows.ragged else past + rows.index
            position = keys.columns(new)
            own = keys.own(new.shape[1], position.shape[1])
            holes = keys.holes or (rows is not None and rows.ragged)
            return Columns(position, own, keys.offset, holes)

        return self.once(("columns", id(rows), *keys.identity), (rows, keys.layer), make)

    def keymap(self, columns: Columns, past: int) -> KeyMap:
        """What cache layers with these columns remember, one object for all of them."""
        skipped = past + self.length - columns.position.shape[1]
        make = partial(KeyMap, columns.position, skipped, columns.holes)
        return self.once(("keymap", id(columns)), (columns,), make)

    def select(self, arguments: dict[str, Any], columns: Columns, recurrent: bool) -> dict[str, Any]:
        """A layer's arguments for the alive rows, each selection made once for a run of layers.

        A `recurrent` layer's mask speaks of its rows alone. Raises `UnsupportedModelError` for a tensor whose
        rows cannot be told.
        """
        rows = self.rows
        chosen = dict(arguments)
        for name, value in arguments.items():
            make: Callable[[], Any]
            if name == "attention_mask" and recurrent:
                make = partial(row_mask, value, rows)
                chosen[name] = self.once(("rows", id(value), id(rows)), (value, rows), make)
            elif name == "attention_mask":
                make = partial(select_mask, value, rows, self.length, columns, self.flash, self.causal)
                chosen[name] = self.once(("mask", id(value), id(columns)), (value, columns), make)
            elif rows is None or not _holds_tensor(value) or name in _ROWLESS:
                continue
            elif name == "cache_position":
                # Layers are handed it to 5.3: to write into static caches, or to scale far positions, which
                # are both refused with rows left out. Its length must be that of the rows.
                chosen[name] = value[rows.reading[0]]
            elif name == "position_ids" and self.flash and value.ndim == 2 and len(value) == 1:
                place = partial(_packed_positions, rows, value)
                chosen[name] = self.once((name, id(value), id(rows)), (value, rows), place)
            elif name in _ROW_DIMENSION:
                take = partial(_take, rows, value, _ROW_DIMENSION[name])
                chosen[name] = self.once((name, id(value), id(rows)), (value, rows), take)
            else:
                raise UnsupportedModelError(
                    f"this model hands its decoder layers {name!r}, whose rows cannot be selected yet"
                )
        return chosen
