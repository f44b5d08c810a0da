"""Static cache layers some of whose positions were skipped.

A static layer has a slot for every position from the start, so skipping saves no memory in it. The keys of a
short prefill are moved to the slots of their own positions; the slots of skipped positions are holes, which
nobody may see. Slots then mean what they mean to the stock model, also while a sliding window rolls on, and
decoding needs nothing but one fixed mask a layer: no host synchronisation, no recompilation.
"""

from __future__ import annotations

from functools import cache as memoised
from typing import Any

import torch
from torch import Tensor

from deepinsert.backbones.compat.torch import mark_static_address
from deepinsert.backbones.compat.transformers import UNREGISTERED


@memoised
def _short_kind(kind: Any) -> type:
    """`kind`, a static cache layer, as one that has skipped tokens: `holes` (B, slots) is True where."""

    class Short(kind):
        holes: Tensor

        def reset(self) -> None:
            super().reset()
            del self.holes
            self.__class__ = kind

        def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
            super().reorder_cache(beam_idx)
            self.holes = self.holes.index_select(0, beam_idx.to(self.holes.device))

    for name, value in UNREGISTERED.items():
        setattr(Short, name, value)
    Short.__name__ = Short.__qualname__ = f"Short{kind.__name__}"
    return Short


def hide_holes(layer: Any, mask: Tensor | None, length: int) -> Tensor:
    """The stock mask of `length` new text rows, with the holes closed; a sliding window's holes move on."""
    holes = blocked = layer.holes
    if layer.is_sliding:
        past, size = layer.cumulative_length_int, layer.max_cache_len
        if past + length > size:
            held = holes[:, 1:] if past >= size else holes[:, :past]
            blocked = torch.cat([held, holes.new_zeros(holes.shape[0], length)], dim=1)
            holes.copy_(blocked[:, -size:])
    if mask is None:
        assert length == 1, "a static cache comes with a mask"
        return ~blocked[:, None, None, :]
    if mask.ndim == 2:
        return mask.masked_fill(blocked, 0)
    lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(blocked[:, None, None, :], lowest)


def _first_position(layer: Any, total: int) -> int:
    """Position of slot 0 when `total` positions have been seen."""
    sliding = layer.is_sliding
    return max(total - layer.max_cache_len, 0) if sliding else 0


def returned_columns(layer: Any, new: Tensor, past: int) -> Tensor:
    """(B, K) positions of the keys that the layer's next update returns; -1 for slots that hold nothing.

    `new` (B, R) are the positions of the rows to come, `past` those seen before.
    """
    size, batch = layer.max_cache_len, new.shape[0]
    held = (torch.arange(size, device=new.device) + _first_position(layer, past)).expand(batch, -1)
    held = held.masked_fill(held >= past, -1)
    if hasattr(layer, "holes"):
        held = held.masked_fill(layer.holes, -1)
    if layer.is_sliding:
        if past >= size:
            return torch.cat([held[:, 1:], new], dim=1)
        if past + new.shape[1] > size:
            return torch.cat([held[:, :past], new], dim=1)
    return torch.cat([held[:, :past], new, held[:, past + new.shape[1] :]], dim=1)


def lay_out(layer: Any, columns: Tensor, past: int, rows: int, length: int) -> None:
    """After an update with `rows` rows of `length` positions: move each key to its position's slot.

    `columns` are those that the update returned. Done in place: compiled code knows the buffers by address.
    """
    size, total = layer.max_cache_len, past + length
    first = _first_position(layer, total)
    held = columns[:, columns.shape[1] - size :]
    slot = torch.where(held >= first, held - first, size)
    for stored in (layer.keys, layer.values):
        index = slot[:, None, :, None].expand_as(stored)
        spare = stored.new_zeros(*stored.shape[:2], 1, stored.shape[3])
        empty = torch.cat([torch.zeros_like(stored), spare], dim=2)
        stored.copy_(empty.scatter(2, index, stored)[:, :, :size])
    vacant = torch.ones(len(slot), size + 1, dtype=torch.bool, device=slot.device).scatter(1, slot, False)
    holes = vacant[:, :size] & (torch.arange(size, device=slot.device) + first < total)
    if hasattr(layer, "holes"):
        layer.holes.copy_(holes)
    else:
        kind: Any = type(layer)
        layer.__class__ = _short_kind(kind)
        layer.holes = holes
        mark_static_address(holes)
    if layer.is_sliding:
        layer.cumulative_length_int = total
        layer.cumulative_length.fill_(min(total, size))
    else:
        layer.cumulative_length.add_(length - rows)
