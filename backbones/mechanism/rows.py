"""Which rows of a batch are alive in which layers, and moving them out of full-length tensors and back.

Shapes: B batch, S = T+M full sequence, R rows alive in a stage (R <= S), D width. A batch member with fewer
than R rows alive is padded on the left with dummy rows. A dummy reads some existing row, attends to itself
alone, is attended to by no other row, and is written to a slot that is thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The rows that are alive in a stage, which is a run of layers between two insertions.

    Args:
        index: (B, R) positions in the full sequence, ascending; `length` for a dummy.
        length: S, the length of the full sequence.
        ragged: Whether there are dummies.
        empty: Whether there are only dummies.
    """

    index: Tensor
    length: int
    ragged: bool
    empty: bool = False

    @cached_property
    def read_index(self) -> Tensor:
        """(B, R) positions to read: `index`, with an existing position for each dummy."""
        return self.index.clamp(max=self.length - 1) if self.ragged else self.index

    @property
    def count(self) -> int:
        """The number R of rows, dummies included."""
        return self.index.shape[1]

    @property
    def valid(self) -> Tensor:
        """(B, R) bool: False for dummies."""
        return self.index < self.length

    def take(self, tensor: Tensor, dim: int) -> Tensor:
        """Return the alive rows of `tensor` along `dim`; its batch dimension is the one before `dim`."""
        dim = dim % tensor.ndim
        return gather_rows(tensor, self.read_index, dim - 1, dim)

    def put(self, hidden: Tensor, full: Tensor) -> Tensor:
        """Return `full` (..., B, S, D) with the alive rows replaced by `hidden` (..., B, R, D)."""
        index = self.index[:, :, None].expand_as(hidden)
        if not self.ragged:
            return full.scatter(-2, index, hidden)
        spare = full.new_zeros(*full.shape[:-2], 1, full.shape[-1])
        return torch.cat([full, spare], dim=-2).scatter(-2, index, hidden)[..., : self.length, :]


Stages = dict[int, Rows | None]
"""The rows alive from each layer on at which they change; None means all rows."""


def alive_rows(alive: Tensor) -> Rows:
    """Return the rows for which `alive` (B, S) is True. The counts need one host synchronisation."""
    length = alive.shape[1]
    counts = alive.sum(dim=1)
    fewest, most = torch.stack(torch.aminmax(counts)).tolist()
    empty = most == 0
    # A layer cannot be called without rows: if there are none at all, each batch member has one dummy.
    most = max(most, 1)
    # A stable sort puts dead positions first and keeps the order of those alive.
    index = torch.sort(alive.to(torch.uint8), dim=1, stable=True).indices[:, length - most :]
    ragged = fewest < most
    if ragged:
        dummy = torch.arange(most, device=alive.device) < (most - counts)[:, None]
        index = index.masked_fill(dummy, length)
    return Rows(index, length, ragged, empty)


def plan_stages(layers: Sequence[int], multimodal: Tensor, real: Tensor, num_layers: int) -> Stages:
    """Return which rows are alive from which layer on.

    Args:
        layers: The insert layer of each of the B batch members.
        multimodal: (B, S) bool, the multimodal positions.
        real: (B, S) bool, the positions that are not padding. Padding enters no layer that lacks rows.
        num_layers: N, the insert layer at which multimodal rows never enter.
    """
    deepest = max(layers)
    layer_of_row = torch.tensor(layers, device=multimodal.device)
    stages: Stages = {}
    for layer in sorted({0, *layers}):
        if layer == deepest:
            stages[layer] = None
        else:
            waiting = multimodal & (layer_of_row > layer)[:, None]
            rows = alive_rows(real & ~waiting)
            is_complete = not rows.ragged and rows.count == rows.length
            stages[layer] = None if is_complete else rows
    if deepest == num_layers:
        del stages[deepest]
    return stages


def gather_rows(tensor: Tensor, index: Tensor, batch_dim: int, dim: int) -> Tensor:
    """Return the rows `index` (B, R) of a tensor, whose batch dimension of size 1 is broadcast.

    Args:
        tensor: A tensor of any number of dimensions.
        index: (B, R) which entries of `dim` to take for each batch member.
        batch_dim: The batch dimension of `tensor`, of size B or 1.
        dim: The dimension of `tensor` that holds the rows.
    """
    shape = [1] * tensor.ndim
    shape[batch_dim], shape[dim] = index.shape
    sizes = list(tensor.shape)
    sizes[batch_dim], sizes[dim] = index.shape
    source = list(tensor.shape)
    source[batch_dim] = index.shape[0]
    return tensor.expand(source).gather(dim, index.view(shape).expand(sizes))
