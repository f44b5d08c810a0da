"""Flex attention's masks for layers in which only some rows exist.

Such a mask is a function of the places of a query and a key. That of a layer with fewer rows asks the stock
model's function with the places that its rows and keys have in the full sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from .rows import Rows


def select_block_mask(
    mask: BlockMask, rows: Rows | None, queries: int, position: Tensor, own: int, offset: int
) -> BlockMask:
    """The part of `mask` between the alive ones of its `queries` rows, all if `rows` is None, and the keys at
    `position` (B, K).

    A key at -1 is a dummy; `own` is the index of the first new row's key, `offset` the position that the
    stock mask's first key stands for. Nobody sees a dummy, which sees itself alone.
    """
    batch, count = position.shape[0], queries if rows is None else rows.count
    place = torch.arange(queries, device=position.device).expand(batch, -1) if rows is None else rows.reading
    place = place.masked_fill(position[:, own : own + count] < 0, -1)
    key = (position - offset).clamp(max=mask.seq_lengths[1] - 1).masked_fill(position < offset, -1)
    stock = mask.mask_mod

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row, column = place[b, q], key[b, k]
        seen = stock(b, h, row.clamp(min=0), column.clamp(min=0)) & (column >= 0)
        return torch.where(row < 0, k == q + own, seen)

    return create_block_mask(
        sees, B=batch, H=None, Q_LEN=count, KV_LEN=position.shape[1], device=str(position.device)
    )
