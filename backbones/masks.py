"""Attention masks for layers in which only some rows exist.

The stock model has already built the full mask, with its causality, padding and windows; a layer that holds
fewer rows gets the same mask with the other rows and columns taken out. Nothing is rebuilt, so every rule of
a family (prefix-LM, sliding windows in original positions) stays as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import Rows, gather_rows


def select_mask(
    mask: Tensor | None,
    rows: Rows | None,
    queries: int,
    columns: Tensor,
    holes: bool,
    flash: bool = False,
    causal: bool = True,
) -> Tensor | None:
    """The part of `mask` between the alive rows and the keys at `columns`.

    `mask` is what the stock model hands its layers: None (causal, or all to all), (B, P+S) or (B|1, H|1, S,
    P+S) for P earlier positions. `rows` are the alive ones of the S = `queries` new rows, None for all.
    `columns` (B, K) are the positions of the keys, those of the new rows last, -1 for a dummy; `holes` says
    whether any is -1, `flash` whether the kernel takes 2-D masks only, `causal` what None means. Returns the
    mask for R rows and K keys, of the same kind, or None where it means the same.
    """
    if mask is None:
        count = rows.count if rows is not None else queries
        if not holes and (count == 1 or count == columns.shape[1]):
            return None
        return columns >= 0 if flash else _plain_mask(columns, count, causal)
    if mask.ndim == 2:
        selected = gather_rows(mask, columns.clamp(min=0), 0, 1)
        return selected.masked_fill(columns < 0, 0) if holes else selected
    if mask.ndim != 4:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)}: an insert layer needs a mask of 2 or 4 dimensions"
        )
    if rows is not None:
        mask = rows.take(mask.expand(columns.shape[0], -1, -1, -1).transpose(1, 2), 1).transpose(1, 2)
    mask = mask.expand(columns.shape[0], -1, -1, -1)
    index = columns.clamp(min=0)[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
    mask = mask.gather(3, index)
    return _close_holes(mask, columns) if holes else mask


def _plain_mask(columns: Tensor, queries: int, causal: bool) -> Tensor:
    """(B, 1, R, K) bool: a key is seen by the queries at or after its position, or by all."""
    position = columns[:, columns.shape[1] - queries :]
    seen = columns[:, None, None, :] <= position[:, None, :, None]
    if not causal:
        seen = torch.ones_like(seen)
    return _close_holes(seen, columns)


def _close_holes(mask: Tensor, columns: Tensor) -> Tensor:
    """Nobody sees a dummy, and a dummy sees itself alone, so that its softmax is defined."""
    blocked = (columns < 0)[:, None, None, :]
    boolean = mask.dtype == torch.bool
    mask = mask.masked_fill(blocked, False if boolean else torch.finfo(mask.dtype).min)
    queries = mask.shape[2]
    own = torch.zeros(queries, columns.shape[1], dtype=torch.bool, device=mask.device)
    own.diagonal(columns.shape[1] - queries).fill_(True)
    dummy_query = (columns[:, columns.shape[1] - queries :] < 0)[:, None, :, None]
    return mask.masked_fill(own & dummy_query, True if boolean else 0.0)
