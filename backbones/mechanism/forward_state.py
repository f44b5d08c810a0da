"""Per-thread state of the forward in progress, and the active `insert_at` overrides."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .calls import Arguments, StockCall
from .forward import Forward
from .layer_range import LayerRange
from .positions import ObservedPositions


@dataclass(frozen=True)
class Override:
    """The arguments of `insert_at`.

    Args:
        layers: One insert layer, or one per row.
        multimodal: (B, S) bool, the multimodal positions; None leaves finding them to the model.
    """

    layers: tuple[int, ...]
    multimodal: Tensor | None = None


ACTIVE_OVERRIDES: ContextVar[dict[int, Override]] = ContextVar("deepinsert", default={})  # noqa: B039
"""The active overrides by the id of the insertion.

The dict is never changed in place, so threads and tasks do not see each other's overrides.
"""


StackReplacement = Callable[[StockCall, Arguments, ObservedPositions], Any]
"""Runs in place of a stack: it gets the stock call, its arguments by name, and the observed positions."""


class ForwardState(threading.local):
    """The state of one thread's forward; a copy of the model starts with an empty state.

    Attributes:
        observed: What the forward has shown about its positions.
        forward: The forward of the stack in progress, if some layer lacks rows.
        replacement: What runs in place of the stack.
        layer_range: The range that the layers run in.
        open_stack_calls: How many calls of the stack are open.
    """

    def __init__(self) -> None:
        """Start without a forward in progress."""
        self.observed = ObservedPositions()
        self.forward: Forward | None = None
        self.replacement: StackReplacement | None = None
        self.layer_range: LayerRange | None = None
        self.open_stack_calls = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardState:
        """Return an empty state: copies of a model share no forward."""
        return ForwardState()
