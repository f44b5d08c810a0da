"""The reward table: the loss of every prompt at every candidate insert layer, each computed once.

The backbone is frozen and the loss deterministic, so this table is all that the environments need to know
of a model, and an exact account of what any policy could reach.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from .block_forward import BlockForward, prefill_flops
from .cells import columns_of, prompt_columns, prompts_of, take_over
from .files import RewardFiles
from .group_forward import GroupForward
from .keys import digest, distinct, group_key, prompt_groups, prompt_keys

if TYPE_CHECKING:
    from deepinsert.backbones import Backbone, CostModel
    from deepinsert.envs.prompts import Prompt

Bonus = Literal["depth", "flops", "time"]
FloatArray = NDArray[np.float64]

METHOD = "shared-1"
"""Named in every file: losses of another way of computing differ in their last bits."""

ADD_SECONDS = 60.0
"""With a folder, at most so much computing is lost when the process is killed."""


class RewardTable:
    """`-loss` and skip bonus of P prompts at K candidate insert layers.

    Losses are computed when first asked for, in groups: the prompts about the same images together, and
    images together up to some dozens of prompts, at all layers asked for. A loss depends on its group and on
    `batch_tokens`, which bounds the memory of a forward, alone: it is the same to the last bit whatever
    was asked before, by whom, and after a resume.

    With `folder`, losses found there are taken over, by the content of a prompt, and what is computed is
    added there now and then and by `flush`. Where a prompt was computed in another group, its loss is taken
    as it is; it differs by rounding alone.

    Attributes:
        insert_layers: the K candidates, ascending. num_layers: N, the backbone's decoder layers. losses:
        float64 (P, K), mean next-token negative log-likelihood of the answer in nats; NaN where unknown.
        correct: float64 (P, K), whether the greedy answer is right, 1 or 0; NaN where unknown. times: prefill
        seconds (K,) relative to layer 0, or None. prompt_ids, sources, image_keys, prompt_keys: P strings
        each, the last of them of the prompt's content. groups, group_of: indices of each group's prompts, and
        each prompt's group (P,).

    Raises `ValueError` for candidates that are not ascending insert layers of this backbone, for no prompts,
    and for a folder with losses of another backbone.
    """

    _files: RewardFiles | None
    _noted: bool

    def __init__(
        self,
        backbone: Backbone,
        prompts: Sequence[Prompt],
        insert_layers: Sequence[int] | Literal["all"] = "all",
        *,
        batch_tokens: int = 8192,
        folder: str | Path | None = None,
    ) -> None:
        if not prompts:
            raise ValueError("no prompts: a reward table needs at least one")
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens {batch_tokens!r}: give at least 1")
        self.num_layers = backbone.num_layers
        self.insert_layers = check_layers(insert_layers, self.num_layers)
        self.prompt_ids = [prompt.id for prompt in prompts]
        self.sources = [prompt.source for prompt in prompts]
        self.image_keys = [prompt.image_key for prompt in prompts]
        self.prompt_keys = prompt_keys(prompts)
        self.groups = prompt_groups(prompts)
        self.group_keys = [""] * len(prompts)
        self.group_of = np.zeros(len(prompts), dtype=np.int64)
        for number, group in enumerate(self.groups):
            key = group_key([self.prompt_keys[index] for index in group], batch_tokens)
            self.group_of[group] = number
            for index in group:
                self.group_keys[index] = key
        self._origin: dict[str, Any] = {
            "fingerprint": backbone.fingerprint,
            "dtype": str(backbone.model.dtype).removeprefix("torch."),
            "num_layers": self.num_layers,
            "method": METHOD,
        }
        self._backbone, self._prompts = backbone, prompts
        self._forward: GroupForward | None = GroupForward(backbone, batch_tokens)
        self._unknown()
        if folder is not None:
            self._files = RewardFiles(folder, self.origin)
            take_over(self, self._files.read_new())

    def _unknown(self) -> None:
        """Make every array of the table, with nothing known."""
        shape = (len(self.prompt_ids), len(self.insert_layers))
        self.losses: FloatArray = np.full(shape, np.nan)
        self.correct: FloatArray = np.full(shape, np.nan)
        self.times: FloatArray | None = None
        # At each candidate and, last, at layer 0: prefill FLOPs, and the most probable first token of the
        # answer. `_greedy`: whether each of the answer's tokens is the most probable one. -1 is not known.
        self._flops: FloatArray = np.full((shape[0], shape[1] + 1), np.nan)
        self._first_tokens: NDArray[np.int32] = np.full((shape[0], shape[1] + 1), -1, dtype=np.int32)
        self._greedy: NDArray[np.int8] = np.full(shape, -1, dtype=np.int8)
        self._parent: tuple[RewardTable, NDArray[np.int64]] | None = None
        self._files, self._noted = None, False
        self._to_add: NDArray[np.bool_] = np.zeros(shape, dtype=np.bool_)
        self._added = time.monotonic()

    @classmethod
    def from_losses(
        cls,
        losses: ArrayLike,
        insert_layers: Sequence[int] | Literal["all"],
        num_layers: int,
        *,
        flops: ArrayLike | None = None,
        full_flops: ArrayLike | None = None,
        times: ArrayLike | None = None,
        sources: Sequence[str] | None = None,
        image_keys: Sequence[str] | None = None,
        prompt_ids: Sequence[str] | None = None,
        prompt_keys: Sequence[str] | None = None,
    ) -> RewardTable:
        """A table of losses (P, K) in nats that are known already; it needs no backbone.

        `flops` (P, K) are the prefill FLOPs at the candidates and `full_flops` (P) those at layer 0, which
        may be left out where layer 0 is a candidate; `times` (K) the prefill seconds relative to layer 0. By
        default every prompt has its own image key.
        """
        table = cls.__new__(cls)
        table.num_layers = int(num_layers)
        table.insert_layers = check_layers(insert_layers, table.num_layers)
        known = np.array(losses, dtype=np.float64)
        shape = (len(known), len(table.insert_layers))
        if known.ndim != 2 or known.shape != shape or not shape[0]:
            raise ValueError(f"losses of shape {known.shape}: expected (prompts, {shape[1]} layers)")
        if np.isinf(known).any():
            raise ValueError("losses hold an infinite value; NaN alone stands for a loss not yet known")
        names = [str(index) for index in range(shape[0])]
        table.prompt_ids = _names("prompt_ids", prompt_ids, names)
        table.sources = _names("sources", sources, [""] * shape[0])
        table.image_keys = _names("image_keys", image_keys, names)
        own = [digest([key, name]) for key, name in zip(table.image_keys, table.prompt_ids, strict=True)]
        table.prompt_keys = _names("prompt_keys", prompt_keys, own)
        table.group_keys = [""] * shape[0]
        table.groups = []
        table.group_of = np.zeros(shape[0], dtype=np.int64)
        table._origin = {"fingerprint": "", "dtype": "", "num_layers": table.num_layers, "method": "given"}
        table._forward = None
        table._unknown()
        table.losses = known
        if flops is not None:
            table._flops = _given_flops(flops, full_flops, table.insert_layers, shape)
        if times is not None:
            table.times = np.array(times, dtype=np.float64)
            if table.times.shape != shape[1:]:
                raise ValueError(f"times of shape {table.times.shape}: expected {shape[1:]}")
        return table

    def __len__(self) -> int:
        return len(self.losses)

    @property
    def complete(self) -> bool:
        """Whether every loss is known."""
        return not np.isnan(self.losses).any()

    @property
    def agreement(self) -> FloatArray:
        """Whether the answer's most probable first token is that of layer 0: (P, K) of 1 and 0, NaN unknown.

        Known where layer 0 of the prompt was computed, as a candidate or found in a folder.
        """
        if self._parent is not None:
            parent, indices = self._parent
            return parent.agreement[indices]
        given, stock = self._first_tokens[:, :-1], self._first_tokens[:, -1:]
        return np.where((given < 0) | (stock < 0), np.nan, (given == stock).astype(np.float64))

    @property
    def greedy(self) -> NDArray[np.int8]:
        """Whether every token of the answer, end of turn included, is the most probable one after those
        before it: (P, K) of 1 and 0, -1 unknown."""
        if self._parent is not None:
            parent, indices = self._parent
            return parent.greedy[indices]
        return self._greedy

    @property
    def flops(self) -> FloatArray:
        """Prefill FLOPs (P, K) of each prompt, without its answer, at each candidate.

        Counts the tokens of prompts whose loss was never asked for, without a forward.
        """
        return self._all_flops()[:, :-1]

    @property
    def stock_flops(self) -> FloatArray:
        """Prefill FLOPs (P,) of each prompt in the stock model, at insert layer 0."""
        return self._all_flops()[:, -1]

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
    def origin(self) -> dict[str, Any]:
        """What the losses were computed with: weights, precision, depth, method. Fit for JSON."""
        return self._parent[0].origin if self._parent is not None else self._origin

    @property
    def identity(self) -> str:
        """16 hex digits over `origin`."""
        return digest(self.origin)

    @property
    def digest(self) -> str:
        """16 hex digits over what the losses were computed with, the prompts' contents, the candidates and
        the losses known now: equal for equal tables alone, in whatever order their prompts are."""
        order = np.argsort(np.array(self.prompt_keys), kind="stable")
        keys = [self.prompt_keys[row] for row in order]
        parts = hashlib.sha256(digest([self.origin, keys, list(self.insert_layers)]).encode())
        losses = self.losses[order]
        parts.update(np.where(np.isnan(losses), np.nan, losses).astype("<f8").tobytes())
        return parts.hexdigest()[:16]

    @property
    def apart(self) -> str | None:
        """Why prompts had to run by themselves, without sharing prefixes; None where none did so far."""
        return None if self._forward is None else self._forward.apart

    def loss(self, prompt: int, column: int) -> float:
        """Loss in nats of prompt `prompt` at `insert_layers[column]`; computes its group where unknown."""
        self.compute([prompt], [column])
        return float(self.losses[prompt, column])

    def bonus(self, kind: Bonus = "depth") -> FloatArray:
        """Skip bonus (P, K) in [0, 1]: "depth" is L / N, "flops" the share of prefill FLOPs saved, "time" the
        share of prefill time saved (`times`)."""
        if kind == "depth":
            depth = np.array(self.insert_layers, dtype=np.float64) / self.num_layers
            return np.tile(depth, (len(self), 1))
        if kind == "flops":
            return np.clip(1 - self.flops_ratio, 0, 1)
        if kind == "time":
            if self.times is None:
                raise LookupError("bonus 'time': this table has no times; measure them and set table.times")
            return np.tile(np.clip(1 - np.asarray(self.times), 0, 1), (len(self), 1))
        raise ValueError(f"bonus {kind!r}: choose 'depth', 'flops' or 'time'")

    def rewards(self, skip_weight: float, bonus: Bonus = "depth") -> FloatArray:
        """`-loss + skip_weight * bonus` (P, K), after computing what is missing."""
        self.fill()
        return -self.losses + check_skip_weight(skip_weight) * self.bonus(bonus)

    def compute(self, prompts: ArrayLike, columns: ArrayLike) -> None:
        """Make the losses of the pairs (`prompts[i]`, `columns[i]`) known, in whole groups.

        Raises `ValueError` naming prompt and layer where a loss is not finite, and `LookupError`
        where it is unknown and the table has no backbone to compute it with.
        """
        rows, cols = np.asarray(prompts, dtype=np.int64), np.asarray(columns, dtype=np.int64)
        missing = np.isnan(self.losses[rows, cols])
        rows, cols = rows[missing], cols[missing]
        if not len(rows):
            return
        if self._parent is not None:
            parent, indices = self._parent
            parent.compute(indices[rows], cols)
            self.losses[rows, cols] = parent.losses[indices[rows], cols]
            return
        if self._forward is None:
            raise LookupError(
                f"the loss of prompt {self.prompt_ids[rows[0]]!r} at insert layer "
                f"{self.insert_layers[cols[0]]} is unknown, and this table has no backbone to compute it"
            )
        groups = self.group_of[rows]
        for group in np.unique(groups):
            self._compute_group(self._forward, int(group), np.unique(cols[groups == group]))
        if time.monotonic() - self._added > ADD_SECONDS:
            self.flush()

    def fill(self, progress: bool = False) -> None:
        """Compute all that is missing; `progress` shows a bar with the time left on stderr."""
        missing = np.isnan(self.losses)
        rows = np.flatnonzero(missing.any(axis=1))
        groups = self.group_of if self._parent is None else self._parent[0].group_of[self._parent[1]]
        rows = rows[np.argsort(groups[rows], kind="stable")]
        ends = np.flatnonzero(np.diff(groups[rows])) + 1
        bar = tqdm(desc="reward table", total=int(missing.sum()), disable=not progress, unit=" cells")
        with bar:
            for members in np.split(rows, ends) if len(rows) else []:
                prompts, columns = np.nonzero(missing[members])
                self.compute(members[prompts], columns)
                bar.update(len(prompts))
        self.flush()

    def subset(self, indices: ArrayLike) -> RewardTable:
        """The table of some prompts (indices into this one, or a mask).

        What is not yet known is computed by this table, in its own groups: the same bits, known here too.
        """
        chosen = np.arange(len(self))[np.asarray(indices)]
        part = RewardTable.from_losses(
            self.losses[chosen],
            self.insert_layers,
            self.num_layers,
            times=self.times,
            sources=[self.sources[index] for index in chosen],
            image_keys=[self.image_keys[index] for index in chosen],
            prompt_ids=[self.prompt_ids[index] for index in chosen],
            prompt_keys=[self.prompt_keys[index] for index in chosen],
        )
        part.correct = self.correct[chosen]
        part._parent = (self, chosen)
        return part

    def flush(self) -> None:
        """Add what was computed since the last time to the folder, where the table has one."""
        if self._parent is not None:
            self._parent[0].flush()
        elif self._files is not None and self._to_add.any():
            if not self._noted:
                self._files.write_prompts(prompt_columns(self))
                self._noted = True
            self._files.write("added", columns_of(self, *np.nonzero(self._to_add)))
            self._files.complete()
            self._to_add[:] = False
        self._added = time.monotonic()

    def save(self, folder: str | Path) -> None:
        """Write the table, complete or not, to a folder of Parquet files. What is there of others stays."""
        if self._parent is not None:
            raise ValueError("a subset is not saved by itself: save the table that it is a part of")
        files = RewardFiles(folder, self.origin)
        files.write_prompts(prompt_columns(self))
        files.write("added", columns_of(self, *np.nonzero(~np.isnan(self.losses))))
        files.complete()

    @classmethod
    def load(cls, folder: str | Path, insert_layers: Sequence[int] | None = None) -> RewardTable:
        """Read a table from its folder, without a backbone: all prompts in it, at all layers in it.

        The largest data set's prompts come first, in their order. `insert_layers` chooses some layers. Losses
        that nobody has computed yet are NaN (`complete` says whether there are any). Raises `ValueError`
        naming the file that is damaged or missing, and where the folder holds no table.
        """
        files = RewardFiles(folder)
        if missing := files.missing():
            raise ValueError(
                f"{files.folder / missing[0]} is missing: compute it again with the command that wrote the "
                f"table, or remove {files.folder / '_manifest.json'} to read what is left"
            )
        shards = list(files.read_new())
        prompts = prompts_of(files.prompt_lists())
        found = sorted(
            {int(layer) for shard in shards for layer in shard["insert_layer"].unique().to_pylist()}
        )
        if not shards or not prompts["prompt_id"]:
            raise ValueError(f"{folder} holds no losses yet: finish the command that writes the table")
        layers = found if insert_layers is None else list(insert_layers)
        table = cls.from_losses(
            np.full((len(prompts["prompt_id"]), len(layers)), np.nan),
            layers,
            files.origin["num_layers"],
            sources=prompts["source"],
            image_keys=prompts["image_key"],
            prompt_ids=prompts["prompt_id"],
            prompt_keys=prompts["prompt_key"],
        )
        table.group_keys = prompts["group_key"]
        table._origin = {name: value for name, value in files.origin.items() if name != "format"}
        take_over(table, shards)
        return table

    def _compute_group(self, forward: GroupForward, group: int, columns: NDArray[np.int64]) -> None:
        members = self.groups[group]
        # The same question asked twice is computed once: its content alone decides its loss.
        first, position = distinct([self.prompt_keys[index] for index in members])
        chosen = members[first]
        layers = [self.insert_layers[column] for column in columns]
        result = forward.run([self._prompts[index] for index in chosen], layers)
        if not np.isfinite(result.losses).all():
            row, column = np.argwhere(~np.isfinite(result.losses))[0]
            raise ValueError(
                f"the loss of prompt {self.prompt_ids[chosen[row]]!r} at insert layer {layers[column]} is "
                f"{result.losses[row, column]}; check that its answer is not empty, or try another --dtype"
            )
        cells = np.ix_(members, columns)
        self.losses[cells] = result.losses[position]
        self._first_tokens[cells] = result.first_tokens[position]
        self._greedy[cells] = result.greedy[position]
        if 0 in layers:
            self._first_tokens[members, -1] = result.first_tokens[position, layers.index(0)]
        tokens = result.text_tokens[position], result.multimodal_tokens[position]
        self._flops[members] = self._count(members, *tokens)
        self._to_add[cells] = True

    def _count(
        self, rows: NDArray[np.int64], text: NDArray[np.int64], multimodal: NDArray[np.int64]
    ) -> FloatArray:
        """FLOPs of prompts with so many tokens, at the candidates and at layer 0."""
        prompts = [self._prompts[row] for row in rows]
        return prefill_flops(self._costs, prompts, text, multimodal, (*self.insert_layers, 0))

    @cached_property
    def _costs(self) -> CostModel:
        from deepinsert.backbones import CostModel

        return CostModel.from_model(self._backbone.model)

    def _all_flops(self) -> FloatArray:
        if self._parent is not None:
            parent, indices = self._parent
            return parent._all_flops()[indices]
        unknown = np.isnan(self._flops).any(axis=1)
        if unknown.any() and self._forward is None:
            raise LookupError("this table does not know the FLOPs of every prompt: give them to from_losses")
        for group in np.unique(self.group_of[unknown]):
            rows = self.groups[group]
            block = BlockForward(self._backbone, [self._prompts[row] for row in rows])
            self._flops[rows] = self._count(rows, *block.count_tokens(block.encode(slice(None))))
        return self._flops


def check_layers(insert_layers: Sequence[int] | Literal["all"], num_layers: int) -> tuple[int, ...]:
    """Candidate insert layers as a tuple; "all" is 0 to N-1. Raises `ValueError` unless ascending in 0..N."""
    layers = (
        tuple(range(num_layers)) if insert_layers == "all" else tuple(int(layer) for layer in insert_layers)
    )
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] > num_layers:
        raise ValueError(
            f"insert_layers {insert_layers!r}: give ascending layers from 0 to {num_layers}, or 'all'"
        )
    return layers


def check_skip_weight(skip_weight: float) -> float:
    """`skip_weight` where it is finite and not negative; `ValueError` otherwise."""
    if not (np.isfinite(skip_weight) and skip_weight >= 0):
        raise ValueError(f"skip_weight {skip_weight!r}: give a finite weight of at least 0")
    return float(skip_weight)


def _given_flops(
    flops: ArrayLike, full_flops: ArrayLike | None, insert_layers: tuple[int, ...], shape: tuple[int, ...]
) -> FloatArray:
    """FLOPs (P, K + 1) at the candidates and, last, at layer 0."""
    known = np.asarray(flops, dtype=np.float64)
    if full_flops is None and insert_layers[0] != 0:
        raise ValueError("layer 0 is not a candidate: give full_flops, the FLOPs at layer 0, too")
    if known.shape != shape:
        raise ValueError(f"flops of shape {known.shape}: expected {shape}")
    stock = known[:, 0] if full_flops is None else np.asarray(full_flops, dtype=np.float64)
    return np.column_stack([known, stock])


def _names(name: str, values: Sequence[str] | None, default: list[str]) -> list[str]:
    if values is None:
        return default
    if len(values) != len(default):
        raise ValueError(f"{name}: {len(values)} values for {len(default)} prompts")
    return [str(value) for value in values]
