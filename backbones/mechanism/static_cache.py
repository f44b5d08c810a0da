"""Static cache layers in which some positions were skipped.

A static layer has a slot for every position from the start, so skipping saves no memory. The keys of a short
prefill are moved to the slots of their own positions. The slots of skipped positions are holes, to which no
row may attend. Slots keep the meaning that they have in the stock model, also while a sliding window rolls
on, and decoding needs only one fixed mask per layer: no host synchronisation and no recompilation.
"""

from __future__ import annotations

from functools import cache as memoised
from typing import Any

import torch
from torch import Tensor

from deepinsert.backbones.compat.torch import mark_static_address
from deepinsert.backbones.compat.transformers import UNREGISTERED


@memoised
def _class_with_holes(stock_class: Any) -> type:
    """Return the static cache class for layers that have skipped tokens, a subclass of `stock_class`.

    Its attribute `holes` (B, slots) is True for slots of skipped positions.
    """

    class Short(stock_class):  # type: ignore[misc]  # the base is a cache class, known at run time
        holes: Tensor

        def reset(self) -> None:
            super().reset()
            del self.holes
            self.__class__ = stock_class

        def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
            super().reorder_cache(beam_idx)
            self.holes = self.holes.index_select(0, beam_idx.to(self.holes.device))

    for name, value in UNREGISTERED.items():
        setattr(Short, name, value)
    Short.__name__ = Short.__qualname__ = f"Short{stock_class.__name__}"
    return Short


def hide_holes(layer: Any, mask: Tensor | None, length: int) -> Tensor:
    """Return the stock mask of `length` new text rows with the holes closed.

    The holes of a sliding window move on with it. A mask of None, for one new row, becomes (B, 1, 1, K).
    """
    holes = hidden = layer.holes
    if layer.is_sliding:
        past, size = layer.cumulative_length_int, layer.max_cache_len
        if past + length > size:
            earlier = holes[:, 1:] if past >= size else holes[:, :past]
            hidden = torch.cat([earlier, holes.new_zeros(holes.shape[0], length)], dim=1)
            holes.copy_(hidden[:, -size:])
    if mask is None:
        assert length == 1, "a static cache comes with a mask"
        visible: Tensor = ~hidden[:, None, None, :]
        return visible
    if mask.ndim == 2:
        return mask.masked_fill(hidden, 0)
    lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(hidden[:, None, None, :], lowest)


def _first_position(layer: Any, total: int) -> int:
    """Return the position of slot 0 after `total` positions."""
    return max(total - layer.max_cache_len, 0) if layer.is_sliding else 0


def returned_columns(layer: Any, new_positions: Tensor, past: int) -> Tensor:
    """Return the positions (B, K) of the keys that the layer's next update returns; -1 for empty slots.

    `new_positions` (B, R) are the positions of the rows to come, `past` is the number of earlier positions.
    """
    size, (batch, count) = layer.max_cache_len, new_positions.shape
    slots = torch.arange(size, device=new_positions.device) + _first_position(layer, past)
    stored = slots.expand(batch, -1)
    stored = stored.masked_fill(stored >= past, -1)
    if hasattr(layer, "holes"):
        stored = stored.masked_fill(layer.holes, -1)
    if layer.is_sliding:
        if past >= size:
            return torch.cat([stored[:, 1:], new_positions], dim=1)
        if past + count > size:
            return torch.cat([stored[:, :past], new_positions], dim=1)
    return torch.cat([stored[:, :past], new_positions, stored[:, past + count :]], dim=1)


def move_keys_to_slots(layer: Any, columns: Tensor, past: int, rows: int, length: int) -> None:
    """Move each key to the slot of its position, after an update of a layer that lacks rows.

    The buffers are changed in place, since compiled code knows them by their address.

    Args:
        layer: The static cache layer.
        columns: (B, K) positions of the keys that the update returned; see `returned_columns`.
        past: The number of positions before the update.
        rows: The number R of rows that the layer got.
        length: The number S of new positions in the full sequence.
    """
    size, total = layer.max_cache_len, past + length
    first = _first_position(layer, total)
    stored_columns = columns[:, columns.shape[1] - size :]
    slot = torch.where(stored_columns >= first, stored_columns - first, size)
    for buffer in (layer.keys, layer.values):
        index = slot[:, None, :, None].expand_as(buffer)
        spare = buffer.new_zeros(*buffer.shape[:2], 1, buffer.shape[3])
        empty = torch.cat([torch.zeros_like(buffer), spare], dim=2)
        buffer.copy_(empty.scatter(2, index, buffer)[:, :, :size])
    vacant = torch.ones(len(slot), size + 1, dtype=torch.bool, device=slot.device).scatter(1, slot, False)
    holes = vacant[:, :size] & (torch.arange(size, device=slot.device) + first < total)
    if hasattr(layer, "holes"):
        layer.holes.copy_(holes)
    else:
        stock_class: Any = type(layer)
        layer.__class__ = _class_with_holes(stock_class)
        layer.holes = holes
        mark_static_address(holes)
    if layer.is_sliding:
        layer.cumulative_length_int = total
        layer.cumulative_length.fill_(min(total, size))
    else:
        layer.cumulative_length.add_(length - rows)
