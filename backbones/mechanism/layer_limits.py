"""What the decoder layers of one stack allow, such as insert layers and prompt lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deepinsert.backbones.compat.transformers import cache_in
from deepinsert.backbones.errors import UnsupportedModelError
from deepinsert.backbones.families import deepest_insert_layer, farthest_position, is_recurrent, window_of

from .cache import LayerKeys, check_can_continue
from .rows import Rows


@dataclass(frozen=True)
class LayerLimits:
    """The limits of a stack of N decoder layers.

    Args:
        num_layers: N.
        deepest: The deepest insert layer that is allowed.
        farthest: The longest prompt, in positions, for which layers may lack rows; None if there is no limit.
        windows: The sliding window of each layer, in positions; None for a layer that sees all positions.
        recurrent: Whether each layer carries a state from row to row.
    """

    num_layers: int
    deepest: int
    farthest: int | None
    windows: tuple[int | None, ...]
    recurrent: tuple[bool, ...]

    @classmethod
    def of(cls, stack: Any) -> LayerLimits:
        """Read the limits of `stack` from its layers and its configuration."""
        num_layers = len(stack.layers)
        return cls(
            num_layers,
            deepest_insert_layer(stack),
            farthest_position(stack),
            tuple(window_of(stack, index) for index in range(num_layers)),
            tuple(is_recurrent(stack, index) for index in range(num_layers)),
        )

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raise `ValueError` unless `layers` holds one or more insert layers, all from 0 to the deepest."""
        wrong = [layer for layer in layers if not 0 <= layer <= self.deepest]
        if wrong or not layers:
            limit = (
                "the number of decoder layers of this model"
                if self.deepest == self.num_layers
                else f"the first of its {self.num_layers} decoder layers whose keys later layers share"
            )
            raise ValueError(
                f"insert layer {wrong or list(layers)}: give 0 (stock) to {self.deepest}, {limit}"
            )

    def check_window(self, index: int, keys: LayerKeys, attention: str) -> None:
        """Check that FlashAttention may run layer `index` while rows are missing.

        FlashAttention counts a sliding window in physical rows. One new token on a cache that itself keeps
        the window is allowed, since the kernel then gets the keys of the window only.

        Raises `UnsupportedModelError`, which names the implementation `attention`, if the positions exceed
        the window.
        """
        window, total = self.windows[index], keys.past + keys.length
        if window is None or total <= window or (keys.length == 1 and keys.windowed):
            return
        raise UnsupportedModelError(
            f"{attention!r} counts the window of {window} positions of layer {index} in rows, which are "
            f"fewer than the {total} positions: call "
            'model.set_attn_implementation("sdpa"), or insert at layer 0'
        )

    def check_can_leave_out(self, index: int, call: dict[str, Any], keys: LayerKeys, rows: Rows) -> None:
        """Check that layer `index` and its cache can run without some rows.

        Args:
            index: The layer.
            call: The layer's arguments by name.
            keys: The state of the layer's cache before the call.
            rows: The rows that are alive.

        Raises:
            UnsupportedCacheError: The cache cannot skip tokens, or holds a state that dummies change.
            UnsupportedModelError: The prompt is longer than `farthest`.
        """
        keys.check_can_skip(call.get("attention_mask"))
        if self.recurrent[index] and rows.ragged and not rows.empty:
            check_can_continue(cache_in(call), index)
        end = keys.past + keys.length
        if self.farthest is not None and end > self.farthest:
            raise UnsupportedModelError(
                f"a prompt of {end} positions: this model scales attention by row numbers from "
                f"{self.farthest + 1} on, which are wrong in a layer that lacks rows; insert at layer 0"
            )
