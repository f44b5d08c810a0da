"""Which rows of a batch are alive in which layers, and moving them in and out of full-length tensors.

Shapes: B batch, S = T+M full sequence, R rows alive at a stage (R <= S), D width. Rows that a batch member
does not have are dummies on its left; they read any row, attend to themselves alone, are nobody's key, and
are written to a slot that is thrown away.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The rows alive during a stage, a run of layers between two insertions.

    `index` (B, R) holds positions in the full sequence of length `length`, ascending; a dummy has the value
    `length`. `ragged` says whether there are dummies, `empty` whether there is nothing else.
    """

    index: Tensor
    length: int
    ragged: bool
    empty: bool = False

    @cached_property
    def reading(self) -> Tensor:
        """`index` with dummies sent to an existing row."""
        return self.index.clamp(max=self.length - 1) if self.ragged else self.index

    @property
    def count(self) -> int:
        """R."""
        return self.index.shape[1]

    @property
    def valid(self) -> Tensor:
        """(B, R) bool, False at dummies."""
        return self.index < self.length

    def take(self, tensor: Tensor, dim: int) -> Tensor:
        """The alive rows of `tensor` along `dim`; its batch dimension is the one before `dim`."""
        dim = dim % tensor.ndim
        return gather_rows(tensor, self.reading, dim - 1, dim)

    def put(self, hidden: Tensor, full: Tensor) -> Tensor:
        """`full` (..., B, S, D) with the alive rows replaced by `hidden` (..., B, R, D)."""
        index = self.index[:, :, None].expand_as(hidden)
        if not self.ragged:
            return full.scatter(-2, index, hidden)
        spare = full.new_zeros(*full.shape[:-2], 1, full.shape[-1])
        return torch.cat([full, spare], dim=-2).scatter(-2, index, hidden)[..., : self.length, :]


def rows_of(alive: Tensor) -> Rows:
    """The rows where `alive` (B, S) is True. One host synchronisation, for the counts."""
    length = alive.shape[1]
    counts = alive.sum(dim=1)
    fewest, most = torch.stack(torch.aminmax(counts)).tolist()
    empty = most == 0
    # No row of the batch has a token here: one dummy each, as a layer cannot be called with nothing.
    most = max(most, 1)
    # A stable sort puts dead positions first and keeps the order among the living.
    index = torch.sort(alive.to(torch.uint8), dim=1, stable=True).indices[:, length - most :]
    ragged = fewest < most
    if ragged:
        dummy = torch.arange(most, device=alive.device) < (most - counts)[:, None]
        index = index.masked_fill(dummy, length)
    return Rows(index, length, ragged, empty)


def gather_rows(tensor: Tensor, index: Tensor, batch_dim: int, dim: int) -> Tensor:
    """Rows `index` (B, R) of `tensor` along `dim`, broadcasting a batch dimension of size 1."""
    shape = [1] * tensor.ndim
    shape[batch_dim], shape[dim] = index.shape
    sizes = list(tensor.shape)
    sizes[batch_dim], sizes[dim] = index.shape
    source = list(tensor.shape)
    source[batch_dim] = index.shape[0]
    return tensor.expand(source).gather(dim, index.view(shape).expand(sizes))
