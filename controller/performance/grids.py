"""The cells that are measured: case, model, batch and depths; a quick grid, and a full one for the docs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .ideal_ratios import Setting

Depth = float | tuple[float, ...]
"""L / N of the whole batch, or one per row."""

QUARTERS: tuple[Depth, ...] = (0.0, 0.25, 0.5, 0.75)
HALVES: tuple[Depth, ...] = (0.0, 0.5, 0.75)
EIGHTHS: tuple[Depth, ...] = tuple(part / 8 for part in range(9))
PER_ROW: tuple[Depth, ...] = ((0.0, 0.25, 0.5, 0.75), (0.25, 0.25, 0.75, 0.75), 0.5)


@dataclass(frozen=True)
class Cell:
    """One measurement: `rows` x (`text` + `multimodal`) tokens at each of `depths`, and at stock."""

    case: str
    """One of the cases of `deepinsert bench`, such as "prefill"."""
    model: str
    """Name of a built-in or published model, or the user's backbone."""
    rows: int
    text: int
    """Text tokens per row; of a ragged batch, those of its longest row."""
    multimodal: int
    """Multimodal tokens per row that has images."""
    depths: tuple[Depth, ...]
    repeats: int
    """Rounds to measure."""
    attention: str = ""
    """Attention kernel; empty for the model's own."""

    @property
    def key(self) -> str:
        """The name of the cell and of its file."""
        size = f"{self.rows}x{self.text}+{self.multimodal}"
        kernel = f"_{self.attention}" if self.attention else ""
        return f"{self.case}_{self.model.replace('/', '--')}_{size}_{len(self.depths)}{kernel}"

    def settings(self, num_layers: int) -> tuple[Setting, ...]:
        """Return the insert layers of a model with `num_layers` decoder layers.

        Depths per row are repeated until every row has one.
        """
        settings: list[Setting] = []
        for depth in self.depths:
            if isinstance(depth, tuple):
                repeated = (depth * self.rows)[: self.rows]
                settings.append(tuple(round(part * num_layers) for part in repeated))
            else:
                settings.append(round(depth * num_layers))
        return tuple(dict.fromkeys(settings))

    def texts(self) -> list[int]:
        """Return the text tokens per row: equal, or from a quarter to all of them in a ragged batch."""
        if self.case == "ragged":
            return [
                round(self.text * (0.25 + 0.75 * row / max(self.rows - 1, 1))) for row in range(self.rows)
            ]
        return [self.text] * self.rows

    def images(self, tokens: int) -> list[int]:
        """Return the images per row, of `tokens` tokens each; a mixed batch has them in every other row."""
        number = max(self.multimodal // tokens, 1)
        return [0 if self.case == "mixed" and row % 2 else number for row in range(self.rows)]


def quick_grid() -> list[Cell]:
    """Return the cells of the quick grid: about five minutes on two CPU cores."""
    return [
        Cell("prefill", "bench", 1, 64, 576, EIGHTHS, 5),
        Cell("prefill", "bench", 1, 128, 576, QUARTERS, 5),
        Cell("prefill", "bench-half", 8, 64, 576, QUARTERS, 3),
        Cell("prefill", "bench", 1, 64, 2304, QUARTERS, 3),
        Cell("decode", "bench", 1, 64, 576, QUARTERS, 3),
        Cell("train-full", "bench", 1, 64, 576, QUARTERS, 3),
        Cell("train-lora", "bench", 1, 64, 576, QUARTERS, 3),
        Cell("rows", "bench", 4, 64, 576, PER_ROW, 3),
        Cell("ragged", "bench-half", 4, 64, 576, HALVES, 3),
        Cell("mixed", "bench-half", 4, 64, 576, HALVES, 3),
    ]


def full_grid() -> list[Cell]:
    """Return the cells of the full grid: under an hour on two CPU cores.

    Batches that would take hours are measured on smaller models.
    """
    cells = [Cell("prefill", "bench", 1, 64, 576, EIGHTHS, 15)]
    sizes = [
        ("bench", 1, 576, 9),
        ("bench", 1, 2304, 5),
        ("bench", 8, 576, 5),
        ("bench-half", 8, 2304, 3),
        ("bench-half", 32, 576, 3),
        ("bench-small", 32, 2304, 3),
    ]
    for model, rows, multimodal, repeats in sizes:
        for text in (64, 128):
            cells.append(Cell("prefill", model, rows, text, multimodal, QUARTERS, repeats))
        cells.append(Cell("decode", model, rows, 64, multimodal, HALVES, repeats))
    for case in ("train-full", "train-lora"):
        cells.append(Cell(case, "bench", 1, 64, 576, QUARTERS, 7))
        cells.append(Cell(case, "bench-half", 8, 64, 576, QUARTERS, 3))
    cells.append(Cell("rows", "bench", 4, 64, 576, PER_ROW, 7))
    cells.append(Cell("rows", "bench-half", 8, 64, 576, PER_ROW, 5))
    for case in ("ragged", "mixed"):
        cells.append(Cell(case, "bench", 4, 64, 576, QUARTERS, 5))
    return cells


def narrow_grid(
    cells: Sequence[Cell], cases: Sequence[str], model: str | None, rows: int | None, repeats: int | None
) -> list[Cell]:
    """Select the cells of some cases and replace model, rows or repeats; equal cells appear once.

    Args:
        cells: a grid.
        cases: the cases to select; all if empty.
        model: another model for all cells; None keeps each cell's own, here and below.
        rows: another number of rows.
        repeats: another number of rounds.
    """
    if model == "bench-tiny":
        cells = [replace(cell, text=cell.text // 4, multimodal=cell.multimodal // 9) for cell in cells]
    selected = [
        replace(
            cell,
            model=cell.model if model is None else model,
            rows=cell.rows if rows is None else rows,
            repeats=cell.repeats if repeats is None else repeats,
        )
        for cell in cells
        if not cases or cell.case in cases
    ]
    return list({cell.key: cell for cell in reversed(selected)}.values())[::-1]
