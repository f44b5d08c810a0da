"""What a forward is doing and what was asked of it: state of one thread or task, kept beside the model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .forward import Forward
from .layer_range import Section
from .positions import Sightings


@dataclass(frozen=True)
class Override:
    """What `insert_at` asks for: insert layers, one or one a row, and which positions are multimodal."""

    layers: tuple[int, ...]
    multimodal: Tensor | None = None


OVERRIDES: ContextVar[dict[int, Override]] = ContextVar("deepinsert", default={})  # noqa: B039
"""By the id of the insertion. Never changed in place, so that threads and tasks do not see each other's."""


Driver = Callable[[Callable[..., Any], dict[str, Any], Sightings], Any]
"""Does a stack's work in its place: given the stock call, its arguments by name, and what was seen before."""


class Progress(threading.local):
    """What one thread's forward is doing; a copy of the model starts afresh."""

    def __init__(self) -> None:
        self.seen = Sightings()
        self.forward: Forward | None = None
        self.driver: Driver | None = None
        self.section: Section | None = None
        self.depth = 0
        """How many calls of the stack are open."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Progress:
        return Progress()
