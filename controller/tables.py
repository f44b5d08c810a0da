"""Text tables from headings and rows of cells: Markdown, and aligned columns for a terminal.

Both take the alignment of the columns as a string with one character per column: `<` left, `>` right, `^`
centred. The last character holds for all further columns, so `"<"` aligns every column to the left, and
`"<>"` the first to the left and all others to the right.
"""

from __future__ import annotations

from collections.abc import Sequence

GAP = "  "
"""Spaces between two columns in a terminal."""

RULES = {"<": "---", ">": "---:", "^": ":---:"}
"""Cells of the rule below the headings in Markdown; left is what Markdown does without a colon."""


def markdown_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    alignment: str = "<",
    *,
    compact_rule: bool = False,
) -> str:
    r"""Return a table in GitHub's Markdown, without a newline at its end.

    A bar inside a cell is written as `\|`, and a newline as a space.

    Args:
        headings: the text above each column.
        rows: the cells of each line, as many as there are headings.
        alignment: one of `<`, `>`, `^` per column; the last one holds for all further columns.
        compact_rule: write the rule below the headings without spaces, `|---|---|`.

    Raises:
        ValueError: a row has another number of cells than there are headings, or the alignment is unknown.
    """
    _check_widths(headings, rows)
    rule = [RULES[sign] for sign in _alignment_per_column(alignment, len(headings))]
    rule_line = f"|{'|'.join(rule)}|" if compact_rule else _markdown_line(rule)
    return "\n".join([_markdown_line(headings), rule_line, *map(_markdown_line, rows)])


def terminal_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    alignment: str = "<",
    *,
    least_widths: Sequence[int] = (),
) -> str:
    """Return a table with aligned columns, two spaces between them, and no spaces at the ends of lines.

    Args:
        headings: the text above each column.
        rows: the cells of each line, as many as there are headings.
        alignment: one of `<`, `>`, `^` per column; the last one holds for all further columns.
        least_widths: characters that the first columns have at least, whatever they hold.

    Raises:
        ValueError: a row has another number of cells than there are headings, or the alignment is unknown.
    """
    _check_widths(headings, rows)
    lines = [headings, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    for column, least in enumerate(least_widths):
        widths[column] = max(widths[column], least)
    signs = _alignment_per_column(alignment, len(headings))
    return "\n".join(
        GAP.join(
            f"{cell:{sign}{width}}" for cell, sign, width in zip(line, signs, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def _markdown_line(cells: Sequence[str]) -> str:
    escaped = [cell.replace("|", r"\|").replace("\n", " ") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _alignment_per_column(alignment: str, columns: int) -> str:
    if not alignment or set(alignment) - set(RULES):
        raise ValueError(f"alignment {alignment!r}: give one of <, > and ^ per column")
    return (alignment + alignment[-1] * columns)[:columns]


def _check_widths(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for row in rows:
        if len(row) != len(headings):
            raise ValueError(f"a row of {len(row)} cells below {len(headings)} headings: {list(row)}")
