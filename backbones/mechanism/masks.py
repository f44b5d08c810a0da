"""Attention masks for layers in which only some rows exist.

The stock model has already built the full mask, with its causality, padding and windows. A layer that lacks
rows gets the same mask without their rows and columns. The mask is not built again, so all rules of a family
(prefix-LM, sliding windows in original positions) still hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .flex_masks import select_block_mask
from .rows import Rows, gather_rows


@dataclass(frozen=True)
class Columns:
    """The K keys that a layer's attention reads.

    Args:
        positions: (B, K) position of each key in the full sequence, -1 for a dummy.
        first_new: The index of the first new row's key among the K keys.
        offset: The position that the first column of the stock mask stands for.
        has_holes: Whether some key is a dummy or lies before `offset`.
    """

    positions: Tensor
    first_new: int
    offset: int
    has_holes: bool


def select_mask(
    mask: Tensor | BlockMask | None,
    rows: Rows | None,
    queries: int,
    columns: Columns,
    flash: bool = False,
    causal: bool = True,
) -> Tensor | BlockMask | None:
    """Return the part of `mask` between the R alive rows and the K keys of `columns`.

    Args:
        mask: What the stock model passes to its layers, for P earlier positions: None, (B, P+S),
            (B|1, H|1, S, P+S), or flex attention's mask of that shape.
        rows: The alive rows among the S new rows; None means all.
        queries: The number S of new rows in the full sequence.
        columns: The keys that the layer reads.
        flash: Whether the kernel takes only 2-D masks.
        causal: Whether None means causal attention; otherwise it means that every row attends to every other.

    Returns:
        A mask of the same kind, or None where it means the same.

    Raises:
        ValueError: The mask has neither 2 nor 4 dimensions.
    """
    positions, has_holes = columns.positions, columns.has_holes
    if mask is None:
        count = rows.count if rows is not None else queries
        if not has_holes and (count == 1 or count == positions.shape[1]):
            return None
        return positions >= columns.offset if flash else _plain_mask(columns, count, causal)
    if isinstance(mask, BlockMask):
        return select_block_mask(mask, rows, queries, positions, columns.first_new, columns.offset)
    if mask.ndim not in (2, 4):
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)}: an insert layer needs a mask of 2 or 4 dimensions"
        )
    index = (positions - columns.offset).clamp(min=0, max=mask.shape[-1] - 1)
    if mask.ndim == 2:
        selected = gather_rows(mask, index, 0, 1)
        return selected.masked_fill(positions < columns.offset, 0) if has_holes else selected
    batch = positions.shape[0]
    mask = mask.expand(batch, -1, -1, -1)
    if rows is not None:
        mask = rows.take(mask.transpose(1, 2), 1).transpose(1, 2)
    mask = mask.gather(3, index[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))
    return _close_holes(mask, columns) if has_holes else mask


def row_mask(mask: Tensor | None, rows: Rows | None) -> Tensor | None:
    """Return the alive rows of a recurrent layer's mask (B, S), in which padding and dummies are 0."""
    if rows is None or (mask is None and not rows.ragged):
        return mask
    if mask is None:
        return rows.valid.long()
    return rows.take(mask, 1).masked_fill(~rows.valid, 0)


def _plain_mask(columns: Columns, queries: int, causal: bool) -> Tensor:
    """Return a mask (B, 1, R, K), bool: causal in full-sequence positions, or else without restriction."""
    query_positions = columns.positions[:, columns.first_new : columns.first_new + queries]
    visible = columns.positions[:, None, None, :] <= query_positions[:, None, :, None]
    if not causal:
        visible = torch.ones_like(visible)
    return _close_holes(visible, columns)


def _close_holes(mask: Tensor, columns: Columns) -> Tensor:
    """Hide dummies from all rows, and let each dummy attend to itself, so that its softmax is defined."""
    hidden = (columns.positions < columns.offset)[:, None, None, :]
    is_bool = mask.dtype == torch.bool
    mask = mask.masked_fill(hidden, False if is_bool else torch.finfo(mask.dtype).min)
    queries, first_new = mask.shape[2], columns.first_new
    own_key = torch.zeros(queries, mask.shape[3], dtype=torch.bool, device=mask.device)
    own_key.diagonal(first_new).fill_(True)
    dummy_query = (columns.positions[:, first_new : first_new + queries] < 0)[:, None, :, None]
    return mask.masked_fill(own_key & dummy_query, True if is_bool else 0.0)
