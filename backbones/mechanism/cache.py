"""Key-value cache layers that hold fewer keys than the sequence has positions.

Layers below the insert layer store no key or value of a multimodal token, while `generate()` and the mask
code of `transformers` go on asking for the logical length. A layer that has skipped tokens stays an object of
the stock cache; its class becomes a subclass that answers with the logical length and remembers which
position of the full sequence each key has. `LayerKeys` is the mechanism's view of one layer in one call.
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

from .static_cache import lay_out, returned_columns


@dataclass(frozen=True)
class KeyMap:
    """`columns` (B, K0) gives the position of a layer's first K0 keys in the full sequence, -1 for a dummy.

    Keys that come later are text for every row: key k has position k + `skipped`. Layers of one stage share
    one map; so that they go on sharing it when beams are reordered, a map remembers its last selection.
    """

    columns: Tensor
    skipped: int
    ragged: bool
    last: dict[str, tuple[Tensor, KeyMap]] = field(default_factory=dict, repr=False, compare=False)

    def select(self, indices: Tensor) -> KeyMap:
        known = self.last.get("select")
        if known is None or known[0] is not indices:
            columns = self.columns[indices.to(self.columns.device)]
            self.last["select"] = known = (indices, KeyMap(columns, self.skipped, self.ragged))
        return known[1]

    def repeat(self, repeats: int) -> KeyMap:
        return KeyMap(self.columns.repeat_interleave(repeats, dim=0), self.skipped, self.ragged)

    def positions(self, total: int) -> Tensor:
        """(B, `total`) position of each of the first `total` keys."""
        known = self.columns.shape[1]
        tail = torch.arange(known, total, device=self.columns.device) + self.skipped
        return torch.cat([self.columns, tail.expand(self.columns.shape[0], -1)], dim=1)


@memoised
def _short_kind(kind: Any) -> type:
    """`kind`, a growing cache layer, as one that has skipped tokens: `keymap` says where its keys are."""

    class Short(kind):
        keymap: KeyMap

        def get_seq_length(self) -> int:
            length = super().get_seq_length()
            if hasattr(self, "cumulative_length"):
                return length  # Kept by `become_short`; only a plain layer derives it from its keys.
            return length + self.keymap.skipped

        def reset(self) -> None:
            super().reset()
            del self.keymap
            self.__class__ = kind

        def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
            super().reorder_cache(beam_idx)
            self.keymap = self.keymap.select(beam_idx)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self.keymap = self.keymap.repeat(repeats)

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self.keymap = self.keymap.select(indices)

        def crop(self, asked: int) -> None:
            seen = self.get_seq_length()
            length = seen - tokens_to_remove(asked, seen)
            columns = self.keymap.positions(stored_keys(self))
            # Rows may hold different numbers of removed positions: crop what every row can spare, and blank
            # the rest.
            removed = int((columns >= length).sum(dim=1).min())
            if seen < getattr(self, "sliding_window", seen + 1):
                # To 5.14 the stock method computes the length to keep, which must be that of the keys held.
                become_short(self, KeyMap(columns, 0, self.keymap.ragged), columns.shape[1])
            crop_last_keys(super().crop, removed)
            columns = columns[:, : columns.shape[1] - removed]
            columns = columns.masked_fill(columns >= length, -1)
            ragged = bool((columns < 0).any())
            become_short(self, KeyMap(columns, length - columns.shape[1], ragged), length)

    for name, value in UNREGISTERED.items():
        setattr(Short, name, value)
    Short.__name__ = Short.__qualname__ = f"Short{kind.__name__}"
    return Short


def is_short(layer: Any) -> bool:
    """Whether a cache layer has skipped tokens."""
    return hasattr(layer, "keymap") or hasattr(layer, "holes")


def become_short(layer: Any, keymap: KeyMap, total: int) -> None:
    """Record that a growing layer's keys are at `keymap`, of `total` positions seen."""
    if not hasattr(layer, "keymap"):
        kind: Any = type(layer)
        layer.__class__ = _short_kind(kind)
    layer.keymap = keymap
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = total


def stored_keys(layer: Any) -> int:
    """Keys of each row that a growing layer's map or length speaks of, dummies included."""
    return layer.get_seq_length() - (layer.keymap.skipped if is_short(layer) else 0)


def holds_short_layers(cache: Cache | None) -> bool:
    """Whether some layer of the cache has skipped tokens."""
    return cache is not None and any(is_short(layer) for layer in cache.layers)


def is_short_static(cache: Any, index: int) -> bool:
    """Whether layer `index` of the cache is static and has skipped tokens."""
    return isinstance(cache, Cache) and index < len(cache.layers) and hasattr(cache.layers[index], "holes")


def sees_all(cache: Any, index: int, mask: Any) -> bool:
    """Whether one new row may see every key that layer `index` of the cache holds, as without any mask."""
    if mask is not None or not isinstance(cache, Cache) or index >= len(cache.layers):
        return mask is None
    layer: Any = cache.layers[index]
    keymap = getattr(layer, "keymap", None)
    return keymap is None or not (keymap.ragged or layer.is_sliding)


def is_empty(cache: Cache) -> bool:
    """Whether nothing has been stored yet."""
    layers: list[Any] = [layer for layer in cache.layers if not isinstance(layer, KEYLESS)]
    return not any(layer.is_initialized for layer in layers)


def check_can_continue(cache: Cache | None, index: int) -> None:
    """Raise `UnsupportedCacheError` where recurrent layer `index` already holds a state.

    A dummy on the left of a row would change it; before the first row there is nothing to change.
    """
    if cache is not None and index < len(cache.layers) and holds_state(cache.layers[index]):
        raise UnsupportedCacheError(
            f"layer {index} carries a recurrent state, which a batch cannot continue where its rows have "
            "different numbers of text tokens beside multimodal ones: continue one row at a time, or "
            "insert at layer 0"
        )


class LayerKeys:
    """Decoder layer `index`'s place in the cache just before a call for `length` new positions."""

    def __init__(self, cache: Cache | None, index: int, length: int) -> None:
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
        """Position of the first key that the stock mask has a column for."""

    @property
    def windowed(self) -> bool:
        return getattr(self.layer, "is_sliding", False)

    @property
    def identity(self) -> tuple:
        """What the columns depend on beside the new rows: layers with the same identity share them."""
        known = getattr(self.layer, "keymap", None) or getattr(self.layer, "holes", None)
        held = self.layer.keys.shape[-2] if self.windowed and not self.empty else None
        size = self.layer.max_cache_len if self.static else None
        return id(known), held, self.past, self.offset, self.static, self.windowed, size

    def columns(self, new: Tensor) -> Tensor:
        """(B, K) positions of the keys that the layer's attention will see, `new` (B, R) the last of them
        where the layer grows; -1 for dummies and for slots that hold nothing."""
        if self.static:
            return returned_columns(self.layer, new, self.past)
        if self.empty:
            return new
        if self.short:
            held = self.layer.keymap.positions(stored_keys(self.layer))
        else:
            held = torch.arange(self.past, device=new.device).expand(new.shape[0], -1)
        if self.windowed:
            kept, used = self.layer.keys.shape[-2], usable_window_keys(self.layer)
            kept = kept if used is None else min(kept, used)
            held = held[:, held.shape[1] - kept :]
        return torch.cat([held, new], dim=1)

    def own(self, rows: int, columns: int) -> int:
        """Among `columns` columns, the one of the first of `rows` new rows."""
        written = self.static and columns == self.layer.max_cache_len and self.past + rows <= columns
        return self.past if written else columns - rows

    @property
    def holes(self) -> bool:
        """Whether some key held is nobody's, or outside the window that the stock mask speaks of."""
        if self.static:
            return True
        return self.short and (self.layer.keymap.ragged or self.windowed)

    def needs_mask(self, mask: Any) -> bool:
        """Whether the layer needs another mask than `mask` for new rows that are all alive."""
        return self.short and (mask is not None or self.holes or self.length > 1)

    def check_can_skip(self, mask: Any = None) -> None:
        """Raise `UnsupportedCacheError` where the layer is of a kind that cannot skip tokens, or not with
        attention that takes such a `mask`."""
        if self.cache is None:
            return
        if self.static and isinstance(mask, BlockMask):
            raise UnsupportedCacheError(
                "a static cache cannot skip multimodal tokens with 'flex_attention': use the default "
                'DynamicCache, or call model.set_attn_implementation("sdpa")'
            )
        kind: Any = type(self.layer) if self.layer is not None else self.cache.layer_class_to_replicate
        if self.short or kind in (*GROWING, *INDEXED, *QUANTISED) or (kind in STATIC and STATIC_COUNTS):
            return
        why = f" ({too_old_for_static_caches()})" if kind in STATIC else ""
        raise UnsupportedCacheError(
            f"{getattr(kind, '__name__', kind)} cannot skip multimodal tokens{why}: use the default "
            "DynamicCache, pass use_cache=False, or insert at layer 0"
        )

    def record(self, keymap: KeyMap, rows: int) -> None:
        """After the call, which was given `rows` of the `length` rows: the keys are at `keymap`."""
        if self.cache is None or self.index >= len(self.cache.layers):
            return
        layer: Any = self.cache.layers[self.index]
        if isinstance(layer, KEYLESS):
            return
        if self.static:
            lay_out(layer, keymap.columns, self.past, rows, self.length)
            return
        stored = stored_keys(layer)
        if stored == self.past - (layer.keymap.skipped if self.short else 0):
            return  # This call stored nothing: the layer reads another layer's keys.
        become_short(layer, keymap, self.past + self.length)
