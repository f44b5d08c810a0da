"""Selects rows and keys from flex attention's masks, which are functions of a query's and a key's index.

The mask of a layer that lacks rows calls the stock model's function with the indices that its rows and keys
have in the full sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from .rows import Rows


def select_block_mask(
    mask: BlockMask, rows: Rows | None, queries: int, positions: Tensor, first_new: int, offset: int
) -> BlockMask:
    """Return the part of `mask` between the alive rows and the keys of a layer.

    No row attends to a dummy, and a dummy attends to itself alone.

    Args:
        mask: The stock mask for all rows.
        rows: The alive rows; None means all.
        queries: The number S of new rows in the full sequence.
        positions: (B, K) position of each key in the full sequence, -1 for a dummy.
        first_new: The index of the first new row's key among the K keys.
        offset: The position of the first key that the stock mask has a column for.
    """
    batch, count = positions.shape[0], queries if rows is None else rows.count
    all_rows = torch.arange(queries, device=positions.device).expand(batch, -1)
    query_index = all_rows if rows is None else rows.read_index
    query_index = query_index.masked_fill(positions[:, first_new : first_new + count] < 0, -1)
    key_index = (positions - offset).clamp(max=mask.seq_lengths[1] - 1).masked_fill(positions < offset, -1)
    stock = mask.mask_mod

    def is_visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row, column = query_index[b, q], key_index[b, k]
        visible = stock(b, h, row.clamp(min=0), column.clamp(min=0)) & (column >= 0)
        return torch.where(row < 0, k == q + first_new, visible)

    return create_block_mask(
        is_visible, B=batch, H=None, Q_LEN=count, KV_LEN=positions.shape[1], device=str(positions.device)
    )
