"""The reward table: the loss of every prompt at every candidate insert layer, each computed once.

The backbone is frozen and the loss deterministic, so the environments need no other knowledge of a model, and
the table gives an exact account of what any policy could reach.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from deepinsert.backbones import Backbone
from deepinsert.envs.prompts import Prompt

from .cell_computer import CellComputer
from .cells import Cells, FloatArray, Rows, check_layers
from .keys import IntArray, prompt_groups
from .prompt_names import PromptNames
from .table_folder import TableFolder, load_cells, save_cells

Bonus = Literal["depth", "flops", "time"]
Array = TypeVar("Array", bound=NDArray[Any])


class RewardTable:
    """`-loss` and skip bonus of P prompts at K candidate insert layers.

    A loss is computed when it is first needed, together with its group. A group contains all prompts about
    some images, at least some dozens. A loss depends only on its group and on `batch_tokens`. It is the same
    to the last bit in whatever order losses are computed, by however many processes, and after a restart.

    With `folder`, the table takes over the losses that the folder contains, matched by the content of a
    prompt, and adds its own. A loss that was computed in another group is taken over too, unless `same_group`
    is set; it differs by rounding only.

    Only the table changes its arrays: those that it gives out cannot be written to.

    Args:
        backbone: the backbone.
        prompts: the P prompts.
        insert_layers: the K candidates, ascending; "all" means 0 to N-1.
        batch_tokens: bounds the tokens, and so the memory, of a forward.
        folder: the folder of Parquet files to read and extend.
        same_group: take over only losses that were computed in the same group.
        flush_seconds: losses are added to the folder when this many seconds have passed since the last time;
            a killed process loses at most these. With infinity, the caller decides when to write.
        times: prefill times (K,) relative to layer 0, for the bonus "time": `measure_times(...).ratios`.

    Attributes:
        insert_layers: the K candidates.
        num_layers: N, the backbone's decoder layers.
        times: the prefill times (K,), or None.
        folder: reads and writes the table's folder; None if it has none.
        prompt_keys, prompt_ids, sources, image_keys, group_keys: the prompts' names, P strings each.
        groups: the indices of each group's prompts; empty for a table without a backbone.
        group_of: each prompt's group (P,); in a subset, its group in the whole table.

    Raises:
        ValueError: if the candidates are not ascending insert layers of the backbone, if there are no
            prompts, or if the folder contains losses of another backbone.
    """

    groups: list[IntArray]
    folder: TableFolder | None
    _computer: CellComputer | None

    def __init__(
        self,
        backbone: Backbone,
        prompts: Sequence[Prompt],
        insert_layers: Sequence[int] | Literal["all"] = "all",
        *,
        batch_tokens: int = 8192,
        folder: str | Path | None = None,
        same_group: bool = False,
        flush_seconds: float = 60.0,
        times: ArrayLike | None = None,
    ) -> None:
        if not prompts:
            raise ValueError("no prompts: a reward table needs at least one")
        layers = check_layers(insert_layers, backbone.num_layers)
        groups = prompt_groups(prompts)
        names = PromptNames.of_prompts(prompts, groups, batch_tokens)
        cells = Cells.unknown(len(prompts), layers, backbone.num_layers)
        computer = CellComputer(backbone, prompts, names.prompt_key, batch_tokens)
        self._assemble(names, cells, computer.origin, times)
        self._computer, self.groups = computer, groups
        for number, group in enumerate(groups):
            self.group_of[group] = number
        if folder is not None:
            self.folder = TableFolder(
                folder, names, cells, self._origin, same_group=same_group, flush_seconds=flush_seconds
            )
            self.folder.read()

    def _assemble(
        self, names: PromptNames, cells: Cells, origin: Mapping[str, Any], times: ArrayLike | None
    ) -> RewardTable:
        """Set all fields for a table without a backbone or folder, and return it."""
        self.insert_layers, self.num_layers = cells.insert_layers, cells.num_layers
        self.prompt_keys, self.prompt_ids = names.prompt_key, names.prompt_id
        self.sources, self.image_keys, self.group_keys = names.source, names.image_key, names.group_key
        self.groups, self.folder, self._computer = [], None, None
        self.group_of: IntArray = np.zeros(len(names), dtype=np.int64)
        self.times = None if times is None else _read_only(np.array(times, dtype=np.float64))
        if self.times is not None and self.times.shape != cells.losses.shape[1:]:
            raise ValueError(f"times of shape {self.times.shape}: expected {cells.losses.shape[1:]}")
        self._names, self._cells, self._origin = names, cells, dict(origin)
        self._parent: tuple[RewardTable, IntArray] | None = None
        return self

    @classmethod
    def from_losses(
        cls,
        losses: ArrayLike,
        insert_layers: Sequence[int] | Literal["all"],
        num_layers: int,
        *,
        correct: ArrayLike | None = None,
        flops: ArrayLike | None = None,
        full_flops: ArrayLike | None = None,
        times: ArrayLike | None = None,
        sources: Sequence[str] | None = None,
        image_keys: Sequence[str] | None = None,
        prompt_ids: Sequence[str] | None = None,
        prompt_keys: Sequence[str] | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> RewardTable:
        """Return a table of losses from elsewhere, without a backbone.

        Args:
            losses: (P, K) in nats; NaN is unknown.
            insert_layers: the K candidates, ascending; "all" means 0 to N-1.
            num_layers: N, the backbone's decoder layers.
            correct: (P, K), whether the greedy answer is right, 1 or 0; NaN is unknown.
            flops: the prefill FLOPs (P, K) at the candidates.
            full_flops: the prefill FLOPs (P,) at layer 0; optional if layer 0 is a candidate.
            times: the prefill times (K,) relative to layer 0.
            sources: the source of each prompt.
            image_keys: equal for prompts about the same images; by default each prompt has its own.
            prompt_ids: the id of each prompt.
            prompt_keys: a key of each prompt's content.
            origin: what the losses were computed with: `origin` of the table that computed them.
        """
        layers = check_layers(insert_layers, int(num_layers))
        cells = Cells.of_losses(
            losses, layers, int(num_layers), correct=correct, flops=flops, full_flops=full_flops
        )
        names = PromptNames.of_losses(
            len(cells), prompt_keys=prompt_keys, prompt_ids=prompt_ids, sources=sources, image_keys=image_keys
        )
        origin = origin or {"fingerprint": "", "dtype": "", "num_layers": int(num_layers), "method": "given"}
        return cls.__new__(cls)._assemble(names, cells, origin, times)

    @classmethod
    def load(
        cls, folder: str | Path, insert_layers: Sequence[int] | None = None, *, times: ArrayLike | None = None
    ) -> RewardTable:
        """Read a table from its folder, without a backbone: all prompts in it.

        The prompts of the largest data set come first, in their order. Losses that have not been computed yet
        are NaN. `insert_layers` are the candidates, by default all layers in the folder; `times` (K,) are the
        prefill times relative to layer 0.

        Raises:
            ValueError: if a file is damaged or missing, which the message names, or if the folder contains no
                table.
        """
        return cls.__new__(cls)._assemble(*load_cells(folder, insert_layers), times)

    def subset(self, indices: ArrayLike) -> RewardTable:
        """Return the table of some prompts: indices into this one, or a mask.

        Its unknown losses are computed by this table, in its groups: they have the same bits, and this table
        knows them too.
        """
        root, rows = self._source()
        chosen = np.arange(len(self))[np.asarray(indices)]
        names, cells = self._names.take(chosen), self._cells.take(chosen)
        part = RewardTable.__new__(RewardTable)._assemble(names, cells, self._origin, self.times)
        part.group_of = self.group_of[chosen]
        part._parent = (root, np.arange(len(root))[rows][chosen])
        return part

    def _source(self) -> tuple[RewardTable, Rows]:
        """Return the table that computes for this one, and the rows of this one's prompts in it."""
        return (self, slice(None)) if self._parent is None else self._parent

    def __len__(self) -> int:
        return len(self._cells)

    @property
    def losses(self) -> FloatArray:
        """Mean next-token negative log-likelihood of the answer in nats, (P, K); NaN is unknown."""
        return _read_only(self._cells.losses)

    @property
    def correct(self) -> FloatArray:
        """Whether the greedy answer is right: (P, K) of 1 and 0; NaN is unknown."""
        return _read_only(self._cells.correct)

    @property
    def greedy(self) -> NDArray[np.int8]:
        """Whether every token of the answer, end of turn included, is the most probable one after the tokens
        before it: (P, K) of 1 and 0; -1 is unknown."""
        table, rows = self._source()
        return _read_only(table._cells.greedy[rows])

    @property
    def agreement(self) -> FloatArray:
        """Whether the answer's most probable first token is that of layer 0: (P, K) of 1 and 0.

        It is NaN unless layer 0 of the prompt was computed as a candidate or read from a folder.
        """
        table, rows = self._source()
        return table._cells.take(rows).agreement

    @property
    def flops(self) -> FloatArray:
        """Prefill FLOPs (P, K) of each prompt, without its answer, at each candidate.

        For prompts without losses it counts tokens, without a forward.
        """
        return _read_only(self._all_flops()[:, :-1])

    @property
    def stock_flops(self) -> FloatArray:
        """Prefill FLOPs (P,) of each prompt in the stock model, at insert layer 0."""
        return _read_only(self._all_flops()[:, -1])

    @property
    def flops_ratio(self) -> FloatArray:
        """Prefill FLOPs (P, K) divided by those of the stock model, insert layer 0."""
        return self.flops / self.stock_flops[:, None]

    @property
    def known_flops_ratio(self) -> FloatArray | None:
        """`flops_ratio` (P, K), or None if the table does not contain it."""
        try:
            return self.flops_ratio
        except LookupError:
            return None

    @property
    def known_correct(self) -> FloatArray | None:
        """`correct` (P, K), or None unless all of it is known."""
        return None if np.isnan(self.correct).any() else self.correct

    @property
    def mean_stock_loss(self) -> float | None:
        """Mean loss at insert layer 0, in nats; None if it is no candidate."""
        return float(self.losses[:, 0].mean()) if self.insert_layers[0] == 0 else None

    @property
    def complete(self) -> bool:
        """Whether every loss is known."""
        return not np.isnan(self.losses).any()

    @property
    def origin(self) -> dict[str, Any]:
        """What the losses were computed with: weights, precision, depth, method; JSON values."""
        return dict(self._origin)

    @property
    def digest(self) -> str:
        """16 hex digits of `origin`, the prompts' contents in any order, the candidates and known losses."""
        return self._cells.digest(self._origin, self.prompt_keys)

    @property
    def unshared_reason(self) -> str | None:
        """Why prompts ran by themselves, without a shared prefix; None if none has done so."""
        return None if self._computer is None else self._computer.forward.unshared_reason

    def bonus(self, kind: Bonus = "depth") -> FloatArray:
        """Return the skip bonus (P, K) in [0, 1].

        "depth" is L / N, "flops" the share of prefill FLOPs saved, "time" the share of prefill time saved.
        """
        if kind == "depth":
            depth = np.array(self.insert_layers, dtype=np.float64) / self.num_layers
            return np.tile(depth, (len(self), 1))
        if kind == "flops":
            return np.clip(1 - self.flops_ratio, 0, 1)
        if kind == "time":
            if self.times is None:
                raise LookupError("bonus 'time': this table has no times; measure them and pass times=")
            return np.tile(np.clip(1 - self.times, 0, 1), (len(self), 1))
        raise ValueError(f"bonus {kind!r}: choose 'depth', 'flops' or 'time'")

    def rewards(self, skip_weight: float, bonus: Bonus = "depth") -> FloatArray:
        """Compute what is missing and return `-loss + skip_weight * bonus` (P, K)."""
        self.fill()
        if not (np.isfinite(skip_weight) and skip_weight >= 0):
            raise ValueError(f"skip_weight {skip_weight!r}: give a finite weight of at least 0")
        return -self.losses + float(skip_weight) * self.bonus(bonus)

    def loss(self, prompt: int, column: int) -> float:
        """Return the loss in nats of one prompt at `insert_layers[column]`; compute its group if needed."""
        self.compute([prompt], [column])
        return float(self._cells.losses[prompt, column])

    def compute(self, prompts: ArrayLike, columns: ArrayLike) -> None:
        """Compute the unknown losses among the pairs (`prompts[i]`, `columns[i]`), in whole groups.

        Raises:
            ValueError: if a loss is not finite; it names prompt and layer.
            LookupError: if a loss is unknown and the table has no backbone to compute it.
        """
        rows, cols = np.asarray(prompts, dtype=np.int64), np.asarray(columns, dtype=np.int64)
        missing = np.isnan(self._cells.losses[rows, cols])
        rows, cols = rows[missing], cols[missing]
        if not len(rows):
            return
        if self._parent is not None:
            parent, indices = self._parent
            parent.compute(indices[rows], cols)
            self._cells.losses[rows, cols] = parent._cells.losses[indices[rows], cols]
            return
        if self._computer is None:
            raise LookupError(
                f"the loss of prompt {self.prompt_ids[rows[0]]!r} at insert layer "
                f"{self.insert_layers[cols[0]]} is unknown, and this table has no backbone to compute it"
            )
        groups = self.group_of[rows]
        for group in np.unique(groups):
            members, group_columns = self.groups[group], np.unique(cols[groups == group])
            self._computer.compute(self._cells, members, group_columns)
            if self.folder is not None:
                self.folder.mark(*np.ix_(members, group_columns))
        if self.folder is not None:
            self.folder.flush_if_due()

    def fill(self, progress: bool = False) -> None:
        """Compute all missing losses; `progress` shows a bar with the remaining time on stderr."""
        missing = np.isnan(self._cells.losses)
        rows = np.flatnonzero(missing.any(axis=1))
        rows = rows[np.argsort(self.group_of[rows], kind="stable")]
        ends = np.flatnonzero(np.diff(self.group_of[rows])) + 1
        total = int(missing.sum())
        with tqdm(desc="reward table", total=total, disable=not progress, unit=" cells") as bar:
            for members in np.split(rows, ends) if len(rows) else []:
                prompts, columns = np.nonzero(missing[members])
                self.compute(members[prompts], columns)
                bar.update(len(prompts))
        self.flush()

    def record_correct(self, rows: ArrayLike, columns: ArrayLike, values: ArrayLike) -> None:
        """Record whether the greedy answers of the cells (`rows[i]`, `columns[i]`) are right, 1 or 0."""
        rows, columns = np.asarray(rows, dtype=np.int64), np.asarray(columns, dtype=np.int64)
        if self._parent is not None:
            parent, indices = self._parent
            parent.record_correct(indices[rows], columns, values)
        self._cells.correct[rows, columns] = np.asarray(values, dtype=np.float64)
        if self.folder is not None:
            self.folder.mark(rows, columns)

    def _all_flops(self) -> FloatArray:
        """Return the prefill FLOPs (P, K + 1) at the candidates and, last, at layer 0."""
        if self._parent is not None:
            parent, indices = self._parent
            return parent._all_flops()[indices]
        unknown = np.isnan(self._cells.flops).any(axis=1)
        if unknown.any() and self._computer is None:
            raise LookupError("this table does not know the FLOPs of every prompt: give them to from_losses")
        if self._computer is not None:
            for group in np.unique(self.group_of[unknown]):
                self._computer.count_flops(self._cells, self.groups[group])
        return self._cells.flops

    def flush(self) -> None:
        """Add cells that are not yet in the table's folder to it; does nothing without a folder."""
        table, _ = self._source()
        if table.folder is not None:
            table.folder.flush()

    def save(self, folder: str | Path) -> None:
        """Write the table, complete or not, to a folder of Parquet files; other files in it stay.

        Raises:
            ValueError: for a subset; save the table that it is a part of.
        """
        if self._parent is not None:
            raise ValueError("a subset is not saved by itself: save the table that it is a part of")
        save_cells(folder, self._names, self._cells, self._origin)


def _read_only(array: Array) -> Array:
    """Return a view that cannot be written to."""
    view = array.view()
    view.flags.writeable = False
    return view
