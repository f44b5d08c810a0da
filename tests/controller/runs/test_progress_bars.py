"""Progress bars pass every item on, and write to stderr alone."""

import pytest

from deepinsert.controller.runs.progress_bars import cost_progress_bar, progress_bar


def test_a_bar_yields_every_item_and_counts_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar(range(4), "Counting")) == [0, 1, 2, 3]
    output = capsys.readouterr()
    assert output.out == ""
    assert "Counting" in output.err and "4/4" in output.err


def test_a_cost_bar_ends_at_100_percent(capsys: pytest.CaptureFixture[str]) -> None:
    with cost_progress_bar("Measuring", 3.0) as advance:
        for cost in (0.5, 1.5, 2.0):  # the parts may cost more than was expected
            advance(cost)
    assert "Measuring: 100%" in capsys.readouterr().err
