"""Key-value cache layers that hold fewer keys than the sequence has positions.

Layers below the insert layer store no key or value of a multimodal token, while `generate()` and the mask
code of `transformers` keep asking for the logical length. A growing layer that has skipped tokens stays an
object of the stock cache. Its class becomes a subclass that answers with the logical length and stores the
position of each key in the full sequence. Here such a layer is called short.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache as memoised
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache

from deepinsert.backbones.compat.transformers import (
    GROWING,
    INDEXED,
    KEYLESS,
    QUANTISED,
    STATIC,
    STATIC_COUNTS,
    UNREGISTERED,
    crop_last_keys,
    holds_state,
    mask_offset,
    tokens_to_remove,
    too_old_for_static_caches,
    usable_window_keys,
)
from deepinsert.backbones.errors import UnsupportedCacheError

from .static_cache import move_keys_to_slots, returned_columns


@dataclass(frozen=True)
class KeyMap:
    """The positions of a layer's keys in the full sequence.

    Keys beyond the first K0 are text in every row: key k has position k + `skipped`. The layers of a stage
    share one map. To share it also after beams are reordered, a map remembers its last selection.

    Args:
        columns: (B, K0) position of each of the first K0 keys, -1 for a dummy.
        skipped: The number of positions without a key.
        has_holes: Whether some key must be hidden that the stock mask shows.
        last_selection: The last argument of `select` and its result, under the key "select".
    """

    columns: Tensor
    skipped: int
    has_holes: bool
    last_selection: dict[str, tuple[Tensor, KeyMap]] = field(default_factory=dict, repr=False, compare=False)

    def select(self, indices: Tensor) -> KeyMap:
        """Return the map of the batch members `indices`."""
        selection = self.last_selection.get("select")
        if selection is None or selection[0] is not indices:
            columns = self.columns[indices.to(self.columns.device)]
            selection = (indices, KeyMap(columns, self.skipped, self.has_holes))
            self.last_selection["select"] = selection
        return selection[1]

    def repeat(self, repeats: int) -> KeyMap:
        """Return the map of a batch in which each member is repeated `repeats` times."""
        return KeyMap(self.columns.repeat_interleave(repeats, dim=0), self.skipped, self.has_holes)

    def positions(self, total: int) -> Tensor:
        """Return the positions (B, `total`) of the first `total` keys."""
        count = self.columns.shape[1]
        tail = torch.arange(count, total, device=self.columns.device) + self.skipped
        return torch.cat([self.columns, tail.expand(self.columns.shape[0], -1)], dim=1)


@memoised
def _short_class(stock_class: Any) -> type:
    """Return the class of short layers that is a subclass of `stock_class`, a growing cache layer.

    Its attribute `keymap` holds the positions of the keys.
    """

    class Short(stock_class):  # type: ignore[misc]  # the base is a cache class, known at run time
        keymap: KeyMap

        def get_seq_length(self) -> int:
            length: int = super().get_seq_length()
            if hasattr(self, "cumulative_length"):
                return length  # `become_short` sets it; only a plain layer derives it from its keys.
            return length + self.keymap.skipped

        def reset(self) -> None:
            super().reset()
            del self.keymap
            self.__class__ = stock_class

        def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
            super().reorder_cache(beam_idx)
            self.keymap = self.keymap.select(beam_idx)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self.keymap = self.keymap.repeat(repeats)

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self.keymap = self.keymap.select(indices)

        def crop(self, argument: int) -> None:
            total = self.get_seq_length()
            length = total - tokens_to_remove(argument, total)
            columns = self.keymap.positions(stored_keys(self))
            # Rows may hold different numbers of removed positions: crop only as far as every row allows, and
            # mark the remaining ones as invalid.
            removed = int((columns >= length).sum(dim=1).min())
            if total < getattr(self, "sliding_window", total + 1):
                # Up to 5.14 the stock method computes the length to keep, in keys that the layer holds.
                become_short(self, KeyMap(columns, 0, self.keymap.has_holes), columns.shape[1])
            crop_last_keys(super().crop, removed)
            columns = columns[:, : columns.shape[1] - removed]
            columns = columns.masked_fill(columns >= length, -1)
            has_holes = bool((columns < 0).any())
            become_short(self, KeyMap(columns, length - columns.shape[1], has_holes), length)

    for name, value in UNREGISTERED.items():
        setattr(Short, name, value)
    Short.__name__ = Short.__qualname__ = f"Short{stock_class.__name__}"
    return Short


def is_short(layer: Any) -> bool:
    """Whether a cache layer has skipped tokens."""
    return hasattr(layer, "keymap") or hasattr(layer, "holes")


def become_short(layer: Any, keymap: KeyMap, total: int) -> None:
    """Record that a growing layer's keys have the positions of `keymap`, among `total` positions so far."""
    if not hasattr(layer, "keymap"):
        stock_class: Any = type(layer)
        layer.__class__ = _short_class(stock_class)
    layer.keymap = keymap
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = total


def stored_keys(layer: Any) -> int:
    """Return the number of keys per row that a growing layer has stored so far, dummies included.

    A sliding window counts the keys that it has dropped.
    """
    total: int = layer.get_seq_length()
    return total - (layer.keymap.skipped if is_short(layer) else 0)


def holds_short_layers(cache: Cache | None) -> bool:
    """Whether some layer of the cache has skipped tokens."""
    return cache is not None and any(is_short(layer) for layer in cache.layers)


def is_short_static(cache: Any, index: int) -> bool:
    """Whether layer `index` of the cache is static and has skipped tokens."""
    return isinstance(cache, Cache) and index < len(cache.layers) and hasattr(cache.layers[index], "holes")


def sees_all_keys(cache: Any, index: int, mask: Any) -> bool:
    """Whether one new row may attend to all keys that layer `index` of the cache holds, so needs no mask."""
    if mask is not None or not isinstance(cache, Cache) or index >= len(cache.layers):
        return mask is None
    layer: Any = cache.layers[index]
    keymap = getattr(layer, "keymap", None)
    return keymap is None or not (keymap.has_holes or layer.is_sliding)


def is_empty(cache: Cache) -> bool:
    """Whether no key has been stored yet."""
    layers: list[Any] = [layer for layer in cache.layers if not isinstance(layer, KEYLESS)]
    return not any(layer.is_initialized for layer in layers)


def check_can_continue(cache: Cache | None, index: int) -> None:
    """Raise `UnsupportedCacheError` if recurrent layer `index` already holds a state.

    A dummy on the left of a row would change this state. Before the first row there is none to change.
    """
    if cache is not None and index < len(cache.layers) and holds_state(cache.layers[index]):
        raise UnsupportedCacheError(
            f"layer {index} carries a recurrent state, which a batch cannot continue if its rows have "
            "different numbers of text tokens beside multimodal ones: continue one row at a time, or "
            "insert at layer 0"
        )


class LayerKeys:
    """The state of decoder layer `index` in the cache, just before a call for `length` new positions.

    Attributes:
        layer: The layer of the cache; None if there is none yet, or none with keys.
        static: Whether the layer is static.
        short: Whether it has skipped tokens.
        empty: Whether it holds no key.
        past: The number of positions so far, skipped ones included.
        offset: The position of the first key that the stock mask has a column for.
    """

    def __init__(self, cache: Cache | None, index: int, length: int) -> None:
        """Read the state of layer `index` of `cache`; without a cache, the layer is empty."""
        self.cache, self.index, self.length = cache, index, length
        exists = cache is not None and index < len(cache.layers)
        self.layer: Any = cache.layers[index] if cache is not None and exists else None
        if isinstance(self.layer, KEYLESS):
            self.cache = self.layer = None
        self.static = isinstance(self.layer, STATIC)
        self.short = is_short(self.layer)
        self.empty = self.layer is None or not self.layer.is_initialized
        self.past = 0 if self.empty else int(self.layer.get_seq_length())
        self.offset = 0 if self.layer is None else mask_offset(self.layer, length)

    @property
    def windowed(self) -> bool:
        """Whether the layer keeps only the keys of a sliding window."""
        return getattr(self.layer, "is_sliding", False)

    @property
    def identity(self) -> tuple[object, ...]:
        """What the columns depend on beside the new rows: layers of equal identity have equal columns."""
        positions = getattr(self.layer, "keymap", None) or getattr(self.layer, "holes", None)
        stored = self.layer.keys.shape[-2] if self.windowed and not self.empty else None
        size = self.layer.max_cache_len if self.static else None
        return id(positions), stored, self.past, self.offset, self.static, self.windowed, size

    def columns(self, new_positions: Tensor) -> Tensor:
        """Return the positions (B, K) of the keys that the layer's attention will read.

        `new_positions` (B, R) are those of the new rows; in a growing layer, their keys are the last ones.
        Dummies and empty slots are -1.
        """
        if self.static:
            return returned_columns(self.layer, new_positions, self.past)
        if self.empty:
            return new_positions
        if self.short:
            stored = self.layer.keymap.positions(stored_keys(self.layer))
        else:
            batch = new_positions.shape[0]
            stored = torch.arange(self.past, device=new_positions.device).expand(batch, -1)
        if self.windowed:
            count, usable = self.layer.keys.shape[-2], usable_window_keys(self.layer)
            count = count if usable is None else min(count, usable)
            stored = stored[:, stored.shape[1] - count :]
        return torch.cat([stored, new_positions], dim=1)

    def first_new_column(self, rows: int, columns: int) -> int:
        """Return which of `columns` columns is that of the first of `rows` new rows."""
        in_slots = self.static and columns == self.layer.max_cache_len and self.past + rows <= columns
        return self.past if in_slots else columns - rows

    @property
    def has_holes(self) -> bool:
        """Whether some stored key is a dummy, or lies outside the window that the stock mask covers."""
        if self.static:
            return True
        return self.short and (self.layer.keymap.has_holes or self.windowed)

    def needs_mask(self, mask: Any) -> bool:
        """Whether the layer needs another mask than `mask` for new rows that are all alive."""
        return self.short and (mask is not None or self.has_holes or self.length > 1)

    def check_can_skip(self, mask: Any = None) -> None:
        """Raise `UnsupportedCacheError` if the layer's class cannot skip tokens, or not with this `mask`."""
        if self.cache is None:
            return
        if self.static and isinstance(mask, BlockMask):
            raise UnsupportedCacheError(
                "a static cache cannot skip multimodal tokens with 'flex_attention': use the default "
                'DynamicCache, or call model.set_attn_implementation("sdpa")'
            )
        layer_class: Any = type(self.layer) if self.layer is not None else self.cache.layer_class_to_replicate
        grows = layer_class in (*GROWING, *INDEXED, *QUANTISED)
        if self.short or grows or (layer_class in STATIC and STATIC_COUNTS):
            return
        reason = f" ({too_old_for_static_caches()})" if layer_class in STATIC else ""
        raise UnsupportedCacheError(
            f"{getattr(layer_class, '__name__', layer_class)} cannot skip multimodal tokens{reason}: use the "
            "default DynamicCache, pass use_cache=False, or insert at layer 0"
        )

    def record(self, keymap: KeyMap, rows: int) -> None:
        """Record, after a call with `rows` of the `length` new rows, that the keys are at `keymap`."""
        if self.cache is None or self.index >= len(self.cache.layers):
            return
        layer: Any = self.cache.layers[self.index]
        if isinstance(layer, KEYLESS):
            return
        if self.static:
            move_keys_to_slots(layer, keymap.columns, self.past, rows, self.length)
            return
        stored = stored_keys(layer)
        if stored == self.past - (layer.keymap.skipped if self.short else 0):
            return  # This call stored nothing: the layer reads another layer's keys.
        become_short(layer, keymap, self.past + self.length)
