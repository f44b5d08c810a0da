"""The cells of a reward table, one per prompt and insert layer, and their conversion to rows of shards.

Prompts are matched by content: a row of a shard belongs to every prompt of the table that has its key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from .keys import IntArray, digest
from .prompt_names import PromptNames

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
Rows = IntArray | slice


@dataclass(frozen=True)
class Cells:
    """What is known of P prompts at K candidate insert layers.

    Attributes:
        insert_layers: the K candidates, ascending.
        num_layers: N, the backbone's decoder layers.
        losses: (P, K), the mean next-token negative log-likelihood of the answer in nats; NaN is unknown.
        correct: (P, K), whether the greedy answer is right, 1 or 0; NaN is unknown.
        greedy: (P, K), whether every token of the answer, end of turn included, is the most probable one
            after the tokens before it, 1 or 0; -1 is unknown.
        first_tokens: (P, K + 1), the most probable first token of the answer at each candidate and, last, at
            layer 0; -1 is unknown.
        flops: (P, K + 1), the prefill FLOPs at each candidate and, last, at layer 0; NaN is unknown.
    """

    insert_layers: tuple[int, ...]
    num_layers: int
    losses: FloatArray
    correct: FloatArray
    greedy: NDArray[np.int8]
    first_tokens: NDArray[np.int32]
    flops: FloatArray

    @classmethod
    def unknown(cls, prompts: int, insert_layers: Sequence[int], num_layers: int) -> Cells:
        """Return cells of `prompts` prompts of which nothing is known."""
        shape, wide = (prompts, len(insert_layers)), (prompts, len(insert_layers) + 1)
        return cls(
            tuple(insert_layers),
            num_layers,
            losses=np.full(shape, np.nan),
            correct=np.full(shape, np.nan),
            greedy=np.full(shape, -1, dtype=np.int8),
            first_tokens=np.full(wide, -1, dtype=np.int32),
            flops=np.full(wide, np.nan),
        )

    @classmethod
    def of_losses(
        cls,
        losses: ArrayLike,
        insert_layers: Sequence[int],
        num_layers: int,
        *,
        correct: ArrayLike | None = None,
        flops: ArrayLike | None = None,
        full_flops: ArrayLike | None = None,
    ) -> Cells:
        """Return cells with losses (P, K) from elsewhere; the arguments are those of `RewardTable`."""
        values = np.array(losses, dtype=np.float64)
        if values.ndim != 2 or values.shape[1] != len(insert_layers) or not len(values):
            raise ValueError(
                f"losses of shape {values.shape}: expected (prompts, {len(insert_layers)} layers)"
            )
        if np.isinf(values).any():
            raise ValueError(
                "losses hold an infinite value; only NaN stands for a loss that is not known yet"
            )
        cells = cls.unknown(len(values), insert_layers, num_layers)
        cells.losses[:] = values
        if correct is not None:
            cells.correct[:] = _shaped("correct", correct, values.shape)
        if flops is not None:
            cells.flops[:, :-1] = _shaped("flops", flops, values.shape)
            if full_flops is None and insert_layers[0] != 0:
                raise ValueError("layer 0 is not a candidate: give full_flops, the FLOPs at layer 0, too")
            stock_flops = cells.flops[:, 0] if full_flops is None else full_flops
            cells.flops[:, -1] = _shaped("full_flops", stock_flops, values.shape[:1])
        return cells

    def __len__(self) -> int:
        return len(self.losses)

    @property
    def agreement(self) -> FloatArray:
        """Whether the most probable first token is that of layer 0: (P, K) of 1 and 0; NaN is unknown."""
        tokens, stock = self.first_tokens[:, :-1], self.first_tokens[:, -1:]
        return np.where((tokens < 0) | (stock < 0), np.nan, (tokens == stock).astype(np.float64))

    def take(self, rows: Rows) -> Cells:
        """Return the cells of some prompts: views for a slice, copies for indices."""
        return Cells(self.insert_layers, self.num_layers, *(array[rows] for array in self._arrays()))

    def digest(self, origin: Mapping[str, Any], prompt_keys: Sequence[str]) -> str:
        """Return 16 hex digits of `origin`, the prompts' keys, the candidates and the known losses.

        The digest does not depend on the order of the prompts.
        """
        order = np.argsort(np.array(prompt_keys), kind="stable")
        keys = [prompt_keys[row] for row in order]
        parts = hashlib.sha256(digest([origin, keys, list(self.insert_layers)]).encode())
        losses = self.losses[order]
        parts.update(np.where(np.isnan(losses), np.nan, losses).astype("<f8").tobytes())
        return parts.hexdigest()[:16]

    def shard_columns(self, names: PromptNames, rows: IntArray, columns: IntArray) -> dict[str, Any]:
        """Return the columns of a shard that holds the cells (`rows[i]`, `columns[i]`)."""
        flops, stock_flops = self.flops[rows, columns], self.flops[rows, -1]
        first, stock_first = self.first_tokens[rows, columns], self.first_tokens[rows, -1]
        greedy, correct = self.greedy[rows, columns], self.correct[rows, columns]
        return names.take(rows.tolist()).columns() | {
            "insert_layer": np.array(self.insert_layers, dtype=np.int32)[columns],
            "loss": self.losses[rows, columns],
            "flops": pa.array(flops, mask=np.isnan(flops)),
            "stock_flops": pa.array(stock_flops, mask=np.isnan(stock_flops)),
            "first_token": pa.array(first, mask=first < 0),
            "greedy": pa.array(greedy == 1, mask=greedy < 0),
            "correct": pa.array(correct == 1, mask=np.isnan(correct)),
            "agrees": pa.array(first == stock_first, mask=(first < 0) | (stock_first < 0)),
        }

    def take_over(self, names: PromptNames, shards: Iterable[pa.Table], same_group: bool = False) -> None:
        """Fill unknown cells from `shards`; the first shard that contains a cell counts.

        A cell computed in the same group takes precedence over one computed in another group.

        Args:
            names: the names of the P prompts.
            shards: shards as `RewardFiles.read_new` returns them.
            same_group: ignore cells computed in other groups. The cells are then bit for bit those of
                computing all of them at once.
        """
        keys, groups = _StringIndex(names.prompt_key), _StringIndex(names.group_key)
        pairs, first_of_pair, pair_of = np.unique(
            groups.of_row * len(keys) + keys.of_row, return_index=True, return_inverse=True
        )
        from_other_groups = []
        for shard in shards:
            shard = shard.combine_chunks()
            key, group = keys.lookup(shard["prompt_key"]), groups.lookup(shard["group_key"])
            pair = np.where((key >= 0) & (group >= 0), group * len(keys) + key, -1)
            place = np.minimum(np.searchsorted(pairs, pair), len(pairs) - 1)
            is_same = pairs[place] == pair
            self._fill(first_of_pair[place], shard, is_same)
            if not same_group and (is_other := ~is_same & (key >= 0)).any():
                from_other_groups.append((keys.first_rows[key], shard, is_other))
        self._spread(first_of_pair[pair_of])
        for rows, shard, is_other in from_other_groups:
            self._fill(rows, shard, is_other)
        if not same_group:
            self._spread(keys.first_rows[keys.of_row])

    def _fill(self, rows: IntArray, shard: pa.Table, selected: BoolArray) -> None:
        """Write the `selected` rows of a shard to the unknown cells of the prompts `rows`."""
        layers = shard["insert_layer"].to_numpy()
        column_of_layer = np.full(self.num_layers + 1, -1, dtype=np.int64)
        column_of_layer[list(self.insert_layers)] = np.arange(len(self.insert_layers))
        exists = (layers >= 0) & (layers <= self.num_layers)
        columns = np.where(exists, column_of_layer[np.where(exists, layers, 0)], -1)
        last = np.full_like(columns, len(self.insert_layers))
        at_candidate, at_layer_0 = selected & (columns >= 0), selected & (layers == 0)
        for name, target, target_columns, shard_rows in (
            ("loss", self.losses, columns, at_candidate),
            ("correct", self.correct, columns, at_candidate),
            ("greedy", self.greedy, columns, at_candidate),
            ("first_token", self.first_tokens, columns, at_candidate),
            ("flops", self.flops, columns, at_candidate),
            ("stock_flops", self.flops, last, selected),
            ("first_token", self.first_tokens, last, at_layer_0),
        ):
            has_value = shard_rows & ~shard[name].is_null().to_numpy()
            values = shard[name].filter(pa.array(has_value)).to_numpy().astype(target.dtype)
            target_rows, value_columns = rows[has_value], target_columns[has_value]
            unknown = _is_unknown(target[target_rows, value_columns])
            target[target_rows[unknown], value_columns[unknown]] = values[unknown]

    def _spread(self, first_rows: IntArray) -> None:
        """Fill each prompt's unknown cells from the prompt `first_rows[row]`, which has the same content."""
        rows = np.flatnonzero(first_rows != np.arange(len(first_rows)))
        for target in self._arrays():
            target[rows] = np.where(_is_unknown(target[rows]), target[first_rows[rows]], target[rows])

    def _arrays(self) -> tuple[NDArray[Any], ...]:
        return self.losses, self.correct, self.greedy, self.first_tokens, self.flops


def check_layers(insert_layers: Sequence[int] | Literal["all"], num_layers: int) -> tuple[int, ...]:
    """Return candidate insert layers as a tuple; "all" means 0 to N-1.

    Raises:
        ValueError: unless they are ascending insert layers from 0 to N.
    """
    layers = (
        tuple(range(num_layers)) if insert_layers == "all" else tuple(int(layer) for layer in insert_layers)
    )
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] > num_layers:
        raise ValueError(
            f"insert_layers {insert_layers!r}: give ascending layers from 0 to {num_layers}, or 'all'"
        )
    return layers


class _StringIndex:
    """The distinct strings of a table's column, numbered in the order of their first appearance.

    Attributes:
        of_row: the number of each row's string.
        first_rows: the first row of each string.
    """

    def __init__(self, values: Sequence[str]) -> None:
        self.numbers: dict[str, int] = {}
        self.of_row: IntArray = np.array(
            [self.numbers.setdefault(value, len(self.numbers)) for value in values], dtype=np.int64
        )
        self.first_rows: IntArray = np.unique(self.of_row, return_index=True)[1].astype(np.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    def lookup(self, column: pa.ChunkedArray) -> IntArray:
        """Return the number of each value of a dictionary-encoded column; -1 if the table lacks it."""
        codes = pa.concat_arrays(column.unify_dictionaries().chunks)
        numbers = [self.numbers.get(value, -1) for value in codes.dictionary.to_pylist()]
        indices: IntArray = codes.indices.to_numpy(zero_copy_only=False)
        return np.array([*numbers, -1], dtype=np.int64)[indices]


def _shaped(name: str, values: ArrayLike, shape: tuple[int, ...]) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != shape:
        raise ValueError(f"{name} of shape {array.shape}: expected {shape}")
    return array


def _is_unknown(values: NDArray[Any]) -> BoolArray:
    return np.isnan(values) if values.dtype == np.float64 else values < 0
