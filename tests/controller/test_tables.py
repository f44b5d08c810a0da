"""Tables: the exact text in Markdown and in a terminal, and rows that do not fit."""

from __future__ import annotations

import pytest

from deepinsert.controller.tables import markdown_table, terminal_table

HEADINGS = ("layer", "ms", "goal")
ROWS = [("stock", "1560.6", ""), ("0", "98.0", "met")]


def test_markdown():
    assert markdown_table(HEADINGS, ROWS) == (
        "| layer | ms | goal |\n| --- | --- | --- |\n| stock | 1560.6 |  |\n| 0 | 98.0 | met |"
    )


@pytest.mark.parametrize(
    ("alignment", "compact", "rule"),
    [
        ("<", False, "| --- | --- | --- |"),
        ("<>", False, "| --- | ---: | ---: |"),
        (">^<", False, "| ---: | :---: | --- |"),
        ("<", True, "|---|---|---|"),
        ("<>", True, "|---|---:|---:|"),
    ],
)
def test_the_rule_of_markdown_shows_the_alignment(alignment, compact, rule):
    lines = markdown_table(HEADINGS, ROWS, alignment, compact_rule=compact).splitlines()
    assert lines[1] == rule
    assert lines[2] == "| stock | 1560.6 |  |"


def test_bars_and_newlines_do_not_break_markdown():
    assert markdown_table(["a|b"], [["1 | 2\n3"]]).splitlines() == [r"| a\|b |", "| --- |", r"| 1 \| 2 3 |"]


@pytest.mark.parametrize(
    ("alignment", "lines"),
    [
        ("<", ["layer  ms      goal", "stock  1560.6", "0      98.0    met"]),
        (">>", ["layer      ms  goal", "stock  1560.6", "    0    98.0   met"]),
        (">><", ["layer      ms  goal", "stock  1560.6", "    0    98.0  met"]),
        ("<^", ["layer    ms    goal", "stock  1560.6", "0       98.0   met"]),
    ],
)
def test_columns_of_a_terminal_are_aligned(alignment, lines):
    assert terminal_table(HEADINGS, ROWS, alignment).splitlines() == lines


def test_columns_of_a_terminal_can_be_wider_than_their_cells():
    assert terminal_table(["a", "b"], [["1", "2"]], ">", least_widths=(4,)).splitlines() == [
        "   a  b",
        "   1  2",
    ]


def test_a_table_without_rows_is_its_headings():
    assert markdown_table(["a", "b"], []) == "| a | b |\n| --- | --- |"
    assert terminal_table(["a", "b"], []) == "a  b"


@pytest.mark.parametrize("table", [markdown_table, terminal_table])
def test_rows_that_do_not_fit_are_refused(table):
    with pytest.raises(ValueError, match=r"a row of 2 cells below 3 headings: \['0', 'met'\]"):
        table(HEADINGS, [("0", "met")])
    with pytest.raises(ValueError, match="alignment 'r': give one of"):
        table(HEADINGS, ROWS, "r")
