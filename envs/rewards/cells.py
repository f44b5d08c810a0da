"""Between a reward table in memory and its files: cells become rows of a shard, and rows cells again.

Everything goes by content: a row belongs to every prompt of the table that has its key.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .table import RewardTable

IntArray = NDArray[np.int64]


def prompt_columns(table: RewardTable) -> dict[str, Sequence[str]]:
    """The table's prompts as a data set's list."""
    return {
        "prompt_key": table.prompt_keys,
        "prompt_id": table.prompt_ids,
        "source": table.sources,
        "image_key": table.image_keys,
        "group_key": table.group_keys,
    }


def prompts_of(lists: Iterable[pa.Table]) -> dict[str, list[str]]:
    """The prompts of data sets one after the other, as `prompt_columns`, without those that came before."""
    found: dict[str, list[str]] = {}
    known: set[str] = set()
    for prompts in lists:
        columns = {name: prompts[name].to_pylist() for name in prompts.column_names}
        keys = columns["prompt_key"]
        new = [index for index, key in enumerate(keys) if key not in known]
        for name, values in columns.items():
            found.setdefault(name, []).extend(values[index] for index in new)
        known.update(keys)
    return found or {name: [] for name in ("prompt_key", "prompt_id", "source", "image_key", "group_key")}


def columns_of(table: RewardTable, rows: IntArray, cols: IntArray) -> dict[str, Any]:
    """The columns of a shard that holds the table's cells (`rows[i]`, `cols[i]`), of prompts and layers."""

    def nullable(values: NDArray[Any], unknown: NDArray[np.bool_]) -> pa.Array:
        return pa.array(values, mask=unknown)

    flops, stock = table._flops[rows, cols], table._flops[rows, -1]
    first, greedy, correct = (
        table._first_tokens[rows, cols],
        table._greedy[rows, cols],
        table.correct[rows, cols],
    )
    stock_first = table._first_tokens[rows, -1]
    names = {name: [values[row] for row in rows.tolist()] for name, values in prompt_columns(table).items()}
    return names | {
        "insert_layer": np.array(table.insert_layers, dtype=np.int32)[cols],
        "loss": table.losses[rows, cols],
        "flops": nullable(flops, np.isnan(flops)),
        "stock_flops": nullable(stock, np.isnan(stock)),
        "first_token": nullable(first, first < 0),
        "greedy": nullable(greedy == 1, greedy < 0),
        "correct": nullable(correct == 1, np.isnan(correct)),
        "agrees": nullable(first == stock_first, (first < 0) | (stock_first < 0)),
    }


def take_over(table: RewardTable, shards: Iterable[pa.Table], same_group: bool = False) -> None:
    """Fill what the table does not know from `shards`, of which the first that knows a cell counts.

    A cell computed in the same group comes before one computed in another; with `same_group` the others
    do not count, and the table is then what computing all of it at once would give, bit for bit.
    """
    keys, groups = _Index(table.prompt_keys), _Index(table.group_keys)
    pairs, first_of_pair, pair_of = np.unique(
        groups.of_row * len(keys) + keys.of_row, return_index=True, return_inverse=True
    )
    elsewhere = []
    for shard in shards:
        shard = shard.combine_chunks()
        key, group = keys.of(shard["prompt_key"]), groups.of(shard["group_key"])
        pair = np.where((key >= 0) & (group >= 0), group * len(keys) + key, -1)
        place = np.minimum(np.searchsorted(pairs, pair), len(pairs) - 1)
        same = pairs[place] == pair
        _fill(table, first_of_pair[place], shard, same)
        if not same_group and (other := ~same & (key >= 0)).any():
            elsewhere.append((keys.first[key], shard, other))
    _spread(table, first_of_pair[pair_of])
    for rows, shard, other in elsewhere:
        _fill(table, rows, shard, other)
    if not same_group:
        _spread(table, keys.first[keys.of_row])


class _Index:
    """The different strings of a table's column: where each first stands, and which of them a row has."""

    def __init__(self, values: Sequence[str]) -> None:
        self.numbers: dict[str, int] = {}
        self.of_row: IntArray = np.array(
            [self.numbers.setdefault(value, len(self.numbers)) for value in values], dtype=np.int64
        )
        self.first: IntArray = np.unique(self.of_row, return_index=True)[1].astype(np.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    def of(self, column: pa.ChunkedArray) -> IntArray:
        """The number of each value of a dictionary-encoded column; -1 where the table does not have it."""
        codes = pa.concat_arrays(column.unify_dictionaries().chunks)
        numbers = [self.numbers.get(value, -1) for value in codes.dictionary.to_pylist()]
        return np.array([*numbers, -1], dtype=np.int64)[codes.indices.to_numpy(zero_copy_only=False)]


def _fill(table: RewardTable, rows: IntArray, shard: pa.Table, chosen: NDArray[np.bool_]) -> None:
    """Write the `chosen` rows of a shard to the table's `rows`, where it does not know them."""
    layers = shard["insert_layer"].to_numpy()
    columns = np.full(table.num_layers + 1, -1, dtype=np.int64)
    columns[list(table.insert_layers)] = np.arange(len(table.insert_layers))
    inside = (layers >= 0) & (layers <= table.num_layers)
    cols = np.where(inside, columns[np.where(inside, layers, 0)], -1)

    def put(target: NDArray[Any], name: str, at: IntArray, where: NDArray[np.bool_]) -> None:
        column = shard[name]
        known = where & ~column.is_null().to_numpy()
        values = column.filter(pa.array(known)).to_numpy().astype(target.dtype)
        r, c = rows[known], at[known]
        new = _is_unknown(target[r, c])
        target[r[new], c[new]] = values[new]

    asked = chosen & (cols >= 0)
    for name, target in (
        ("loss", table.losses),
        ("correct", table.correct),
        ("greedy", table._greedy),
        ("first_token", table._first_tokens),
        ("flops", table._flops),
    ):
        put(target, name, cols, asked)
    last = np.full_like(cols, len(table.insert_layers))
    put(table._flops, "stock_flops", last, chosen)
    put(table._first_tokens, "first_token", last, chosen & (layers == 0))


def _spread(table: RewardTable, first: IntArray) -> None:
    """Fill each row's unknown cells from the row `first[row]`, which has the same content."""
    rows = np.flatnonzero(first != np.arange(len(first)))
    for target in (table.losses, table.correct, table._greedy, table._first_tokens, table._flops):
        target[rows] = np.where(_is_unknown(target[rows]), target[first[rows]], target[rows])


def _is_unknown(values: NDArray[Any]) -> NDArray[np.bool_]:
    return np.isnan(values) if values.dtype == np.float64 else values < 0
