"""A reward table's folder: what the table takes over from it, and when it adds its own cells."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .cells import BoolArray, Cells, check_layers
from .files import MANIFEST, RewardFiles
from .keys import IntArray
from .prompt_names import PromptNames


class TableFolder:
    """Connects the cells of a reward table in memory to its folder. Nothing else writes to the folder.

    Args:
        folder: the folder; it is created on the first write.
        names: the names of the table's P prompts.
        cells: the table's cells, which `read` fills.
        origin: what the losses are computed with.
        same_group: read only cells that were computed in the same group.
        flush_seconds: `flush_if_due` writes when this many seconds have passed since the last flush.

    Raises:
        ValueError: if the folder contains losses of another origin.
    """

    def __init__(
        self,
        folder: str | Path,
        names: PromptNames,
        cells: Cells,
        origin: Mapping[str, Any],
        *,
        same_group: bool = False,
        flush_seconds: float = math.inf,
    ) -> None:
        self._files = RewardFiles(folder, origin)
        self._names, self._cells = names, cells
        self._same_group = same_group
        self._flush_seconds, self._flush_time = flush_seconds, time.monotonic()
        self._unwritten: BoolArray = np.zeros(cells.losses.shape, dtype=np.bool_)
        self._prompts_written = False

    def read(self) -> None:
        """Fill unknown cells from the shards that were added to the folder since the last call.

        Raises:
            ValueError: if a file is damaged or has another origin; the message names the file.
        """
        self._cells.take_over(self._names, self._files.read_new(), self._same_group)

    def mark(self, rows: IntArray, columns: IntArray) -> None:
        """Mark cells as computed, so that `flush` writes them; `rows` and `columns` broadcast together."""
        self._unwritten[rows, columns] = True

    def flush(self) -> None:
        """Write the marked cells whose losses are known."""
        selected = self._unwritten & ~np.isnan(self._cells.losses)
        if selected.any():
            self.write_prompts()
            self._write("added", *np.nonzero(selected))
            self._files.write_manifest()
        self._flush_time = time.monotonic()

    def flush_if_due(self) -> None:
        """Write the marked cells if the last flush is long ago."""
        if time.monotonic() - self._flush_time > self._flush_seconds:
            self.flush()

    def write_shard(self, number: int, rows: IntArray, columns: IntArray) -> None:
        """Write the cells (`rows[i]`, `columns[i]`), whose losses are known, as shard `number` of a sweep."""
        self._write(f"losses-{number:05d}", rows, columns)

    def write_prompts(self) -> None:
        """Write the list of the table's prompts, once."""
        if not self._prompts_written:
            self._files.write_prompts(self._names.columns())
            self._prompts_written = True

    def write_manifest(self) -> None:
        """Write the manifest: every file of the folder with its sha256."""
        self._files.write_manifest()

    def _write(self, kind: str, rows: IntArray, columns: IntArray) -> None:
        self._files.write_shard(kind, self._cells.shard_columns(self._names, rows, columns))
        self._unwritten[rows, columns] = False


def save_cells(folder: str | Path, names: PromptNames, cells: Cells, origin: Mapping[str, Any]) -> None:
    """Write all known cells to a folder; files of other tables of the same origin stay in it."""
    table_folder = TableFolder(folder, names, cells, origin)
    table_folder.write_prompts()
    table_folder.mark(*np.nonzero(~np.isnan(cells.losses)))
    table_folder.flush()


def load_cells(
    folder: str | Path, insert_layers: Sequence[int] | None = None
) -> tuple[PromptNames, Cells, dict[str, Any]]:
    """Read all prompts of a folder; the largest data set's come first, in their order.

    Args:
        folder: the folder.
        insert_layers: the candidates, by default all layers in the folder.

    Returns:
        The prompts' names, their cells, and the origin of the losses.

    Raises:
        ValueError: if a file is damaged or missing, which the message names, or if the folder contains no
            losses.
    """
    files = RewardFiles(folder)
    if missing := files.missing():
        raise ValueError(
            f"{files.folder / missing[0]} is missing: compute it again with the command that wrote the "
            f"table, or remove {files.folder / MANIFEST} to read the other files"
        )
    shards = list(files.read_new())
    names = PromptNames.of_lists(files.prompt_lists())
    if not shards or not len(names):
        raise ValueError(f"{folder} holds no losses yet: finish the command that writes the table")
    if insert_layers is None:
        insert_layers = sorted(
            {int(layer) for shard in shards for layer in shard["insert_layer"].unique().to_pylist()}
        )
    num_layers = int(files.origin["num_layers"])
    cells = Cells.unknown(len(names), check_layers(insert_layers, num_layers), num_layers)
    cells.take_over(names, shards)
    return names, cells, {name: value for name, value in files.origin.items() if name != "format"}
