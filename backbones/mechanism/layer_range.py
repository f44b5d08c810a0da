"""A run of some decoder layers on rows that are given as they enter them.

What all insert layers compute alike, the text-only layers above all, is computed once and handed to each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Section:
    """Layers `start` to `stop` - 1 of a stack's forward; the others hand on what they are given.

    At layer `start` the rows where `placed` (R,) is True become `states` (B, R, D). `mask(layer, dtype)` is a
    layer's attention mask (B|1, 1, R, K) for R new rows and K keys. `kept` collects the input (B, R, D) of
    each layer in `keep`.
    """

    start: int
    stop: int
    mask: Callable[[int, torch.dtype], Tensor]
    states: Tensor | None = None
    placed: Tensor | None = None
    keep: frozenset[int] = frozenset()
    in_tuples: bool = False
    """Whether the layers return tuples: those passed over must as well."""
    kept: dict[int, Tensor] = field(default_factory=dict)

    def call(self, index: int, stock: Callable[..., Any], first: str, call: dict[str, Any]) -> Any:
        """Decoder layer `index`, whose hidden states are its argument `first`."""
        hidden = call.pop(first)
        if index == self.start and self.states is not None and self.placed is not None:
            placed = self.placed.to(hidden.device)
            hidden = torch.where(placed[:, None], self.states.to(hidden.device), hidden)
        if index in self.keep:
            self.kept[index] = hidden
        if not self.start <= index < self.stop:
            return (hidden,) if self.in_tuples else hidden
        call["attention_mask"] = self.mask(index, hidden.dtype)
        output = stock(hidden, **call)
        self.in_tuples = isinstance(output, tuple)
        return output


def mask_maker(
    seen: Tensor, rows: Tensor, keys: Tensor, windows: Sequence[int | None]
) -> Callable[[int, torch.dtype], Tensor]:
    """Makes `Section.mask` from `seen` (B|1, R, K) bool: 0 where a key is seen, else the lowest number.

    `rows` (B|1, R) and `keys` (B|1, K) are positions in the full sequence, in which sliding windows are
    measured. One mask serves all layers of a window: sdpa would convert a bool one in each of them.
    """
    made: dict[int | None, Tensor] = {}

    def mask(layer: int, dtype: torch.dtype) -> Tensor:
        window = windows[layer]
        if window not in made:
            visible = seen if window is None else seen & (rows[:, :, None] - keys[:, None, :] < window)
            lowest = torch.finfo(dtype).min
            made[window] = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, lowest)[:, None]
        return made[window]

    return mask
