"""Texts as a tree: each text is a path, and shared tokens occur once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deepinsert.envs.rewards.token_tree import pack_texts, token_tree

TEXTS = st.lists(st.lists(st.integers(0, 3), min_size=0, max_size=8), min_size=1, max_size=12)


@given(TEXTS)
def test_a_path_has_the_tokens_of_its_text_and_each_sees_those_before_it(texts):
    tree = token_tree(texts)
    for text, path in zip(texts, tree.paths, strict=True):
        assert tree.ids[path].tolist() == text
        assert tree.depth[path].tolist() == list(range(len(text)))
        for place, node in enumerate(path):
            assert tree.visible[node].nonzero()[0].tolist() == sorted(path[: place + 1])


@given(TEXTS)
def test_each_beginning_occurs_once(texts):
    beginnings = {tuple(text[:end]) for text in texts for end in range(1, len(text) + 1)}
    assert len(token_tree(texts).ids) == len(beginnings)


@given(TEXTS, st.integers(1, 20))
def test_packs_contain_every_text_in_order_and_are_not_too_large(texts, max_tokens):
    runs = pack_texts(texts, max_tokens)
    assert [index for run in runs for index in run] == list(range(len(texts)))
    for run in runs:
        size = len(token_tree([texts[index] for index in run]).ids)
        assert size <= max_tokens or len(run) == 1
