"""Runs a contiguous range of decoder layers on rows captured at the range's input.

Work that all insert layers share, above all the text-only layers, is done once and its results are passed on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MaskOfLayer = Callable[[int, torch.dtype], Tensor]
"""Returns the attention mask (B|1, 1, R, K) of a layer for R new rows and K keys, in a precision."""


@dataclass
class LayerRange:
    """Layers `start` to `stop` - 1 of a stack's forward; the other layers return their input.

    Args:
        start: The first layer that runs.
        stop: The first layer after the range.
        mask: Returns the attention mask of a layer.
        states: (B, R, D) hidden states that enter layer `start`; None leaves its input as it is.
        replaced: (R,) bool, the rows of layer `start` that become `states`.
        recorded: The layers whose input is recorded.
        in_tuples: Whether the layers return tuples, so that skipped layers must return them too.
        inputs: (B, R, D) input of each recorded layer, by its index.
    """

    start: int
    stop: int
    mask: MaskOfLayer
    states: Tensor | None = None
    replaced: Tensor | None = None
    recorded: frozenset[int] = frozenset()
    in_tuples: bool = False
    inputs: dict[int, Tensor] = field(default_factory=dict)

    def call(self, index: int, stock: Callable[..., Any], hidden_name: str, call: dict[str, Any]) -> Any:
        """Run decoder layer `index`, or return its input if it lies outside the range.

        Args:
            index: The layer.
            stock: The layer's stock call.
            hidden_name: The name of the argument that holds the hidden states.
            call: The layer's arguments by name.
        """
        hidden = call.pop(hidden_name)
        if index == self.start and self.states is not None and self.replaced is not None:
            replaced = self.replaced.to(hidden.device)
            hidden = torch.where(replaced[:, None], self.states.to(hidden.device), hidden)
        if index in self.recorded:
            self.inputs[index] = hidden
        if not self.start <= index < self.stop:
            return (hidden,) if self.in_tuples else hidden
        call["attention_mask"] = self.mask(index, hidden.dtype)
        output = stock(hidden, **call)
        self.in_tuples = isinstance(output, tuple)
        return output


def mask_of_layers(visible: Tensor, rows: Tensor, keys: Tensor, windows: Sequence[int | None]) -> MaskOfLayer:
    """Return a function for `LayerRange.mask`, whose masks are 0 for visible keys and else the lowest number.

    All layers with the same window share one mask. A bool mask would be converted by sdpa in each layer.

    Args:
        visible: (B|1, R, K) bool, the keys that each row attends to without a window.
        rows: (B|1, R) positions of the rows in the full sequence, in which windows are measured.
        keys: (B|1, K) positions of the keys.
        windows: The sliding window of each layer; None for a layer without one.
    """
    masks: dict[int | None, Tensor] = {}

    def mask(layer: int, dtype: torch.dtype) -> Tensor:
        window = windows[layer]
        if window not in masks:
            attended = visible
            if window is not None:
                attended = visible & (rows[:, :, None] - keys[:, None, :] < window)
            lowest = torch.finfo(dtype).min
            masks[window] = torch.zeros_like(attended, dtype=dtype).masked_fill_(~attended, lowest)[:, None]
        return masks[window]

    return mask
