"""The reward table: the loss of every prompt at every candidate insert layer, each computed once.

The backbone is frozen and the loss deterministic, so this table is all that the environments need to know
of a model, and an exact account of what any policy could reach.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from .block_forward import BlockForward

if TYPE_CHECKING:
    import torch

    from backbones import Backbone

    from .prompts import Prompt

Bonus = Literal["depth", "flops", "time"]
FloatArray = NDArray[np.float64]

FIELDS = (
    "losses",
    "flops",
    "insert_layers",
    "num_layers",
    "sources",
    "image_keys",
    "prompt_ids",
    "identity",
)
"""Arrays of a saved table."""


class RewardTable:
    """`-loss` and skip bonus of P prompts at K candidate insert layers.

    Losses are computed when first asked for, in fixed blocks of `batch_size` consecutive prompts, a block
    at one insert layer per forward. Blocks depend on the prompts' order and on `batch_size` alone, so a
    loss is the same to the last bit whatever was asked before, by whom, and after a resume. Another
    `batch_size` changes padding and matrix shapes, and with them float32's last digits.

    Attributes:
        insert_layers: the K candidates, ascending. num_layers: N, the backbone's decoder layers. losses:
        float64 (P, K), mean next-token negative log-likelihood of the answer in nats; NaN where unknown.
        prompt_ids, sources, image_keys: P strings each.

    Raises `ValueError` for candidates that are not ascending insert layers of this backbone, and for no
    prompts.
    """

    _identity: str = ""

    def __init__(
        self,
        backbone: Backbone,
        prompts: Sequence[Prompt],
        insert_layers: Sequence[int] | Literal["all"] = "all",
        batch_size: int = 32,
    ) -> None:
        if not prompts:
            raise ValueError("no prompts: a reward table needs at least one")
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size!r}: give at least 1")
        self.batch_size = batch_size
        self.num_layers = backbone.num_layers
        self.insert_layers = check_layers(insert_layers, self.num_layers)
        self.losses: FloatArray = np.full((len(prompts), len(self.insert_layers)), np.nan)
        self.prompt_ids = [prompt.id for prompt in prompts]
        self.sources = [prompt.source for prompt in prompts]
        self.image_keys = [prompt.image_key for prompt in prompts]
        # Prefill FLOPs at each candidate and, last, at layer 0; NaN until a prompt's tokens are counted.
        self._flops: FloatArray | None = np.full((len(prompts), len(self.insert_layers) + 1), np.nan)
        self._forward: BlockForward | None = BlockForward(backbone, prompts)
        self._parent: tuple[RewardTable, NDArray[np.int64]] | None = None

    @classmethod
    def from_losses(
        cls,
        losses: ArrayLike,
        insert_layers: Sequence[int] | Literal["all"],
        num_layers: int,
        *,
        flops: ArrayLike | None = None,
        full_flops: ArrayLike | None = None,
        sources: Sequence[str] | None = None,
        image_keys: Sequence[str] | None = None,
        prompt_ids: Sequence[str] | None = None,
    ) -> RewardTable:
        """A table of losses (P, K) in nats that are known already; it needs no backbone.

        `flops` (P, K) are the prefill FLOPs at the candidates and `full_flops` (P) those at layer 0, which
        may be left out where layer 0 is a candidate. By default every prompt has its own image key.
        """
        table = cls.__new__(cls)
        table.batch_size = 1
        table.num_layers = int(num_layers)
        table.insert_layers = check_layers(insert_layers, table.num_layers)
        table.losses = np.array(losses, dtype=np.float64)
        shape = (len(table.losses), len(table.insert_layers))
        if table.losses.ndim != 2 or table.losses.shape != shape or not shape[0]:
            raise ValueError(f"losses of shape {table.losses.shape}: expected (prompts, {shape[1]} layers)")
        if np.isinf(table.losses).any():
            raise ValueError("losses hold an infinite value; NaN alone stands for a loss not yet known")
        names = [str(index) for index in range(shape[0])]
        table.prompt_ids = _names("prompt_ids", prompt_ids, names)
        table.sources = _names("sources", sources, [""] * shape[0])
        table.image_keys = _names("image_keys", image_keys, names)
        table._flops = None
        if flops is not None:
            known = np.asarray(flops, dtype=np.float64)
            if full_flops is None and table.insert_layers[0] != 0:
                raise ValueError("layer 0 is not a candidate: give full_flops, the FLOPs at layer 0, too")
            stock = known[:, 0] if full_flops is None else np.asarray(full_flops, dtype=np.float64)
            table._flops = np.column_stack([known, stock])
            if table._flops.shape != (shape[0], shape[1] + 1):
                raise ValueError(f"flops of shape {known.shape}: expected {shape}")
        table._forward = None
        table._parent = None
        return table

    def __len__(self) -> int:
        return len(self.losses)

    @property
    def complete(self) -> bool:
        """Whether every loss is known."""
        return not np.isnan(self.losses).any()

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

    def loss(self, prompt: int, column: int) -> float:
        """Loss in nats of prompt `prompt` at `insert_layers[column]`; computes its block where unknown."""
        self.compute([prompt], [column])
        return float(self.losses[prompt, column])

    def bonus(self, kind: Bonus = "depth") -> FloatArray:
        """Skip bonus (P, K) in [0, 1]: "depth" is L / N, "flops" the share of prefill FLOPs saved."""
        if kind == "depth":
            depth = np.array(self.insert_layers, dtype=np.float64) / self.num_layers
            return np.tile(depth, (len(self), 1))
        if kind == "flops":
            return np.clip(1 - self.flops_ratio, 0, 1)
        raise ValueError(f"bonus {kind!r}: choose 'depth' or 'flops'")

    def rewards(self, skip_weight: float, bonus: Bonus = "depth") -> FloatArray:
        """`-loss + skip_weight * bonus` (P, K), after computing what is missing."""
        self.fill()
        return -self.losses + check_skip_weight(skip_weight) * self.bonus(bonus)

    def compute(self, prompts: ArrayLike, columns: ArrayLike) -> None:
        """Make the losses of the pairs (`prompts[i]`, `columns[i]`) known, each block encoded once.

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
        blocks = rows // self.batch_size
        for block in np.unique(blocks):
            self._compute_block(self._forward, int(block), np.unique(cols[blocks == block]))

    def fill(self, progress: bool = False) -> None:
        """Compute all that is missing; `progress` shows a bar with the time left on stderr."""
        steps = self.fill_by_block()
        for _ in tqdm(steps, desc="reward table", total=self.missing_blocks(), disable=not progress):
            pass

    def fill_by_block(self) -> Iterator[int]:
        """As `fill`, but yields the number of prompts known after each block, for a caller to `save`."""
        blocks = self._blocks()
        missing = np.isnan(self.losses)
        for block in np.unique(blocks[missing.any(axis=1)]):
            rows, cols = np.nonzero(missing & (blocks == block)[:, None])
            self.compute(rows, cols)
            yield int((~np.isnan(self.losses)).all(axis=1).sum())

    def missing_blocks(self) -> int:
        """Blocks of prompts with a loss that is not yet known."""
        return len(np.unique(self._blocks()[np.isnan(self.losses).any(axis=1)]))

    def subset(self, indices: ArrayLike) -> RewardTable:
        """The table of some prompts (indices into this one, or a mask).

        What is not yet known is computed by this table, in its own blocks: the same bits, and known here too.
        """
        chosen = np.arange(len(self))[np.asarray(indices)]
        part = RewardTable.from_losses(
            self.losses[chosen],
            self.insert_layers,
            self.num_layers,
            sources=[self.sources[index] for index in chosen],
            image_keys=[self.image_keys[index] for index in chosen],
            prompt_ids=[self.prompt_ids[index] for index in chosen],
        )
        part._parent = (self, chosen)
        return part

    def save(self, path: str | Path) -> None:
        """Write the table, complete or not, to `path` (.npz): atomically, and without a pickle."""
        save_arrays(
            path,
            losses=self.losses,
            flops=self._known_flops(),
            insert_layers=np.array(self.insert_layers),
            num_layers=np.array(self.num_layers),
            sources=np.array(self.sources, dtype=np.str_),
            image_keys=np.array(self.image_keys, dtype=np.str_),
            prompt_ids=np.array(self.prompt_ids, dtype=np.str_),
            identity=np.array(self.identity),
        )

    @classmethod
    def load(cls, path: str | Path) -> RewardTable:
        """Read a saved table. It has no backbone; `restore` a partial one into a new table to go on.

        Raises `ValueError` where the file is not a reward table.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                content = {name: file[name] for name in FIELDS}
        except (KeyError, ValueError, EOFError, BadZipFile) as error:
            raise ValueError(
                f"{path} is not a reward table ({error}); remove it to compute it anew"
            ) from error
        table = cls.from_losses(
            content["losses"],
            content["insert_layers"].tolist(),
            content["num_layers"].item(),
            sources=content["sources"].tolist(),
            image_keys=content["image_keys"].tolist(),
            prompt_ids=content["prompt_ids"].tolist(),
        )
        if not np.isnan(content["flops"]).all():
            table._flops = content["flops"]
        table._identity = content["identity"].item()
        return table

    def restore(self, path: str | Path) -> int:
        """Take over the losses that `path` already knows; returns how many prompts are complete.

        Raises `ValueError` where they were computed with another backbone, other prompts, candidates or
        batch size.
        """
        saved = RewardTable.load(path)
        if not self.identity or saved.identity != self.identity:
            raise ValueError(
                f"{path} was computed with another backbone, other prompts, insert layers or batch size; "
                "remove it or choose another folder"
            )
        self.losses = saved.losses
        if saved._flops is not None:
            self._flops = saved._flops
        return int((~np.isnan(self.losses)).all(axis=1).sum())

    @property
    def identity(self) -> str:
        """16 hex digits over what the losses depend on: weights, prompts, candidates, batch size."""
        if not self._identity and self._forward is not None:
            parts = [self._forward.identity(), list(self.insert_layers), self.batch_size]
            self._identity = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        return self._identity

    def _blocks(self) -> NDArray[np.int64]:
        """The block of each prompt."""
        if self._parent is not None:
            parent, indices = self._parent
            return parent._blocks()[indices]
        return np.arange(len(self)) // self.batch_size

    def _compute_block(self, forward: BlockForward, block: int, columns: NDArray[np.int64]) -> None:
        rows = slice(block * self.batch_size, (block + 1) * self.batch_size)
        inputs = forward.encode(rows)
        self._count(forward, rows, inputs)
        for column in columns:
            layer = self.insert_layers[column]
            losses = forward.losses(inputs, layer)
            if not np.isfinite(losses).all():
                bad = int(np.argmin(np.isfinite(losses)))
                raise ValueError(
                    f"the loss of prompt {self.prompt_ids[rows.start + bad]!r} at insert layer {layer} is "
                    f"{losses[bad]}; check that its answer is not empty, or try another --dtype"
                )
            self.losses[rows, column] = losses

    def _count(self, forward: BlockForward, rows: slice, inputs: Mapping[str, torch.Tensor]) -> None:
        """Fill the FLOPs of a block's prompts from their tokens."""
        assert self._flops is not None
        if np.isnan(self._flops[rows]).any():
            self._flops[rows] = forward.flops(rows, inputs, (*self.insert_layers, 0))

    def _known_flops(self) -> FloatArray:
        if self._parent is not None:
            parent, indices = self._parent
            return parent._known_flops()[indices]
        if self._flops is None:
            return np.full((len(self), len(self.insert_layers) + 1), np.nan)
        return self._flops

    def _all_flops(self) -> FloatArray:
        if self._parent is not None:
            parent, indices = self._parent
            return parent._all_flops()[indices]
        if self._flops is not None and self._forward is not None:
            blocks = self._blocks()
            for block in np.unique(blocks[np.isnan(self._flops).any(axis=1)]):
                rows = slice(block * self.batch_size, (block + 1) * self.batch_size)
                self._count(self._forward, rows, self._forward.encode(rows))
        if self._flops is None or np.isnan(self._flops).any():
            raise LookupError("this table does not know the FLOPs of every prompt: give them to from_losses")
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


def save_arrays(path: str | Path, **arrays: NDArray[Any]) -> None:
    """Write an .npz atomically: the file is whole or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _names(name: str, values: Sequence[str] | None, default: list[str]) -> list[str]:
    if values is None:
        return default
    if len(values) != len(default):
        raise ValueError(f"{name}: {len(values)} values for {len(default)} prompts")
    return [str(value) for value in values]
