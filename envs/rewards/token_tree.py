"""Texts that begin alike, as one tree of tokens: what several share is in it once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenTree:
    """R tokens of P texts.

    `ids` (R,) are tokens, `depth` (R,) their places in their texts, `seen` (R, R) bool says which tokens come
    before each one in its text, itself among them. `paths[p]` are the nodes of text p, in order.
    """

    ids: NDArray[np.int64]
    depth: NDArray[np.int64]
    seen: NDArray[np.bool_]
    paths: list[list[int]]


def token_tree(texts: Sequence[Sequence[int]]) -> TokenTree:
    """The tree of `texts`, token ids each."""
    children: dict[tuple[int, int], int] = {}
    nodes: list[tuple[int, int, int]] = []  # id, depth, parent
    paths = []
    for text in texts:
        path: list[int] = []
        for depth, token in enumerate(text):
            parent = path[-1] if path else -1
            node = children.setdefault((parent, token), len(nodes))
            if node == len(nodes):
                nodes.append((token, depth, parent))
            path.append(node)
        paths.append(path)
    seen = np.eye(len(nodes), dtype=np.bool_)
    for node, (_, _, parent) in enumerate(nodes):
        if parent >= 0:
            seen[node] |= seen[parent]  # parents come first
    table = np.array(nodes, dtype=np.int64).reshape(-1, 3)
    return TokenTree(table[:, 0], table[:, 1], seen, paths)


def packs(texts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Texts in runs whose trees have at most `most` tokens, as indices; one text alone may have more."""
    runs: list[list[int]] = []
    known: set[tuple[int, ...]] = set()
    for index, text in enumerate(texts):
        ways = {tuple(text[: end + 1]) for end in range(len(text))}
        if not runs or len(known | ways) > most:
            runs.append([])
            known = set()
        runs[-1].append(index)
        known |= ways
    return runs
