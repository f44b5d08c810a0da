"""Texts as a tree: each token where its text has it, none twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deepinsert.envs.rewards.token_tree import packs, token_tree

TEXTS = st.lists(st.lists(st.integers(0, 3), min_size=0, max_size=8), min_size=1, max_size=12)


@given(TEXTS)
def test_a_path_spells_its_text_and_sees_what_comes_before(texts):
    tree = token_tree(texts)
    for text, path in zip(texts, tree.paths, strict=True):
        assert tree.ids[path].tolist() == text
        assert tree.depth[path].tolist() == list(range(len(text)))
        for place, node in enumerate(path):
            assert tree.seen[node].nonzero()[0].tolist() == sorted(path[: place + 1])


@given(TEXTS)
def test_no_beginning_is_there_twice(texts):
    beginnings = {tuple(text[:end]) for text in texts for end in range(1, len(text) + 1)}
    assert len(token_tree(texts).ids) == len(beginnings)


@given(TEXTS, st.integers(1, 20))
def test_packs_hold_every_text_in_order_and_are_no_larger_than_asked(texts, most):
    runs = packs(texts, most)
    assert [index for run in runs for index in run] == list(range(len(texts)))
    for run in runs:
        size = len(token_tree([texts[index] for index in run]).ids)
        assert size <= most or len(run) == 1
