"""Exact match and its normalisation, on cases worked by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepinsert.controller.metrics.rules.exact_match import exact_match, normalise


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The two  Dogs.", "2 dogs"),
        ("Yes", "yes"),
        (" yes.\n", "yes"),
        ("3.5", "3.5"),
        ("1,000", "1,000"),
        ("7.", "7"),
        ("left-hand side", "left-hand side"),
        ("it's red!", "it's red"),
        ("'stop'", "stop"),
        ("a red circle", "red circle"),
        ("A", "a"),
        ("A.", "a"),
        ("the", "the"),
        ("ＡＢＣ", "abc"),
        ("snake_-case", "snake case"),
        ("", ""),
        ("?!", "?!"),
    ],
)
def test_normalise(answer: str, normal: str) -> None:
    assert normalise(answer) == normal


@pytest.mark.parametrize(
    ("prediction", "reference", "right"),
    [
        ("Red.", "red", True),
        ("two", "2", True),
        ("an apple", "apple", True),
        ("No", "yes", False),
        ("red circle", "red", False),
        ("3.5", "35", False),
        ("-5", "5", False),
        (".5", "5", False),
        ("-5.", "-5", True),
        ("U.S.", "u s", True),
        ("का", "की", False),
        ("B", "A", False),
        ("", "", False),
        ("   ", "", False),
    ],
)
def test_exact_match(prediction: str, reference: str, right: bool) -> None:
    assert exact_match(prediction, reference) is right


@given(st.text())
def test_normalising_twice_changes_nothing(answer: str) -> None:
    assert normalise(normalise(answer)) == normalise(answer)
