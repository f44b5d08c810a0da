"""Texts with common beginnings as one tree of tokens, in which shared tokens occur once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenTree:
    """The R tokens of P texts.

    Attributes:
        ids: (R,), the token ids.
        depth: (R,), the tokens' positions in their texts.
        visible: (R, R) bool, the tokens that come before each one in its text, and the token itself.
        paths: the nodes of each text, in order.
    """

    ids: NDArray[np.int64]
    depth: NDArray[np.int64]
    visible: NDArray[np.bool_]
    paths: list[list[int]]


def token_tree(texts: Sequence[Sequence[int]]) -> TokenTree:
    """Return the tree of `texts`, each a sequence of token ids."""
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
    visible = np.eye(len(nodes), dtype=np.bool_)
    for node, (_, _, parent) in enumerate(nodes):
        if parent >= 0:
            visible[node] |= visible[parent]  # a parent has a smaller number than its children
    table = np.array(nodes, dtype=np.int64).reshape(-1, 3)
    return TokenTree(table[:, 0], table[:, 1], visible, paths)


def pack_texts(texts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Divide texts into runs whose trees have at most `max_tokens` tokens; return the runs' indices.

    A single text may have more tokens.
    """
    runs: list[list[int]] = []
    run_beginnings: set[tuple[int, ...]] = set()
    for index, text in enumerate(texts):
        beginnings = {tuple(text[: end + 1]) for end in range(len(text))}
        if not runs or len(run_beginnings | beginnings) > max_tokens:
            runs.append([])
            run_beginnings = set()
        runs[-1].append(index)
        run_beginnings |= beginnings
    return runs
