"""Progress bars on stderr: one step per item, or steps of different cost."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress_bar(iterable: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Iterate over `iterable` with a bar on stderr that shows the items done and the time remaining.

    If stderr is not a terminal, the bar is printed at most once per ten seconds.
    """
    seconds = 0.2 if sys.stderr.isatty() else 10.0
    yield from tqdm(
        iterable, desc=label, total=total, file=sys.stderr, mininterval=seconds, dynamic_ncols=True
    )


@contextmanager
def cost_progress_bar(label: str, total: float) -> Iterator[Callable[[float], None]]:
    """Show a bar on stderr for parts of different cost, whose costs add up to `total`.

    The block gets a function that it calls with the cost of each finished part. The time remaining is
    estimated in proportion to the remaining cost.
    """
    seconds = 0.5 if sys.stderr.isatty() else 10.0
    form = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
    with tqdm(total=total, desc=label, file=sys.stderr, mininterval=seconds, bar_format=form) as bar:

        def advance(cost: float) -> None:
            bar.update(min(cost, total - bar.n))

        yield advance
