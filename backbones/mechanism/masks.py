"""Attention masks for layers in which only some rows exist.

The stock model has already built the full mask, with its causality, padding and windows; a layer that holds
fewer rows gets the same mask with the other rows and columns taken out. Nothing is rebuilt, so every rule of
a family (prefix-LM, sliding windows in original positions) stays as it was.
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
    """The keys that a layer's attention sees.

    `position` (B, K) is each key's place in the full sequence, -1 for a dummy; `own` the index of the first
    new row's key among them; `offset` the position that the stock mask's first column stands for; `holes`
    whether some key is a dummy or lies before `offset`.
    """

    position: Tensor
    own: int
    offset: int
    holes: bool


def select_mask(
    mask: Tensor | BlockMask | None,
    rows: Rows | None,
    queries: int,
    columns: Columns,
    flash: bool = False,
    causal: bool = True,
) -> Tensor | BlockMask | None:
    """The part of `mask` between the alive rows and the keys of `columns`.

    `mask` is what the stock model hands its layers: None (plain causal, or without `causal` all to all),
    (B, P+S), (B|1, H|1, S, P+S), or flex attention's of that shape, for P earlier positions. `rows` are the
    alive ones of the S = `queries` new rows, None for all; `flash` says whether the kernel takes 2-D masks
    only. Returns the mask for R rows and K keys, of the same kind, or None where it means the same.
    """
    position, holes = columns.position, columns.holes
    if mask is None:
        count = rows.count if rows is not None else queries
        if not holes and (count == 1 or count == position.shape[1]):
            return None
        return position >= columns.offset if flash else _plain_mask(columns, count, causal)
    if isinstance(mask, BlockMask):
        return select_block_mask(mask, rows, queries, position, columns.own, columns.offset)
    if mask.ndim not in (2, 4):
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)}: an insert layer needs a mask of 2 or 4 dimensions"
        )
    index = (position - columns.offset).clamp(min=0, max=mask.shape[-1] - 1)
    if mask.ndim == 2:
        selected = gather_rows(mask, index, 0, 1)
        return selected.masked_fill(position < columns.offset, 0) if holes else selected
    batch = position.shape[0]
    mask = mask.expand(batch, -1, -1, -1)
    if rows is not None:
        mask = rows.take(mask.transpose(1, 2), 1).transpose(1, 2)
    mask = mask.gather(3, index[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))
    return _close_holes(mask, columns) if holes else mask


def row_mask(mask: Tensor | None, rows: Rows | None) -> Tensor | None:
    """The alive rows of a recurrent layer's mask (B, S), where 0 is padding; dummies are padding too."""
    if rows is None or (mask is None and not rows.ragged):
        return mask
    if mask is None:
        return rows.valid.long()
    return rows.take(mask, 1).masked_fill(~rows.valid, 0)


def _plain_mask(columns: Columns, queries: int, causal: bool) -> Tensor:
    """(B, 1, R, K) bool: a key is seen by the queries at or after its position, or by all."""
    own = columns.position[:, columns.own : columns.own + queries]
    seen = columns.position[:, None, None, :] <= own[:, None, :, None]
    if not causal:
        seen = torch.ones_like(seen)
    return _close_holes(seen, columns)


def _close_holes(mask: Tensor, columns: Columns) -> Tensor:
    """Nobody sees a dummy, and a dummy sees itself alone, so that its softmax is defined."""
    blocked = (columns.position < columns.offset)[:, None, None, :]
    boolean = mask.dtype == torch.bool
    mask = mask.masked_fill(blocked, False if boolean else torch.finfo(mask.dtype).min)
    queries = mask.shape[2]
    own = torch.zeros(queries, mask.shape[3], dtype=torch.bool, device=mask.device)
    own.diagonal(columns.own).fill_(True)
    dummy_query = (columns.position[:, columns.own : columns.own + queries] < 0)[:, None, :, None]
    return mask.masked_fill(own & dummy_query, True if boolean else 0.0)
