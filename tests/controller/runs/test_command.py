"""The frame of all commands: what it computes, what it reads again, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepinsert.controller.options import SweepOptions
from deepinsert.controller.runs.command import run_command
from deepinsert.controller.runs.folder import read_result


def options_for(out: Path, **changes) -> SweepOptions:
    return SweepOptions(out=out, data=Path(__file__), **changes)


def describe(result: dict) -> str:
    return f"value {result['value']}"


def run(out: Path, result: dict | None, calls: list[Path], **arguments) -> dict:
    changes = arguments.pop("changes", {})

    def compute(folder: Path) -> dict | None:
        calls.append(folder)
        return result

    return run_command(options_for(out, **changes), compute, describe, **arguments)


def test_a_result_is_written_printed_and_not_computed_again(tmp_path, capsys):
    calls: list[Path] = []
    assert run(tmp_path / "run", {"value": (1, 2)}, calls) == {"value": [1, 2]}
    assert capsys.readouterr().out == "value [1, 2]\n"
    assert run(tmp_path / "run", {"value": 3}, calls) == {"value": [1, 2]}
    printed = capsys.readouterr()
    assert printed.out == "value [1, 2]\n"
    assert "nothing to do" in printed.err
    assert calls == [tmp_path / "run"]


def test_a_command_without_reuse_computes_each_time_and_keeps_the_result_when_it_fails(tmp_path):
    calls: list[Path] = []
    run(tmp_path, {"value": 1}, calls, reuse=False)
    assert run(tmp_path, {"value": 2}, calls, reuse=False) == {"value": 2}

    def fail(folder: Path) -> dict:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run_command(options_for(tmp_path), fail, str, reuse=False)
    assert read_result(tmp_path) == {"value": 2}


def test_an_extended_run_replaces_the_result(tmp_path):
    calls: list[Path] = []
    run(tmp_path, {"value": 1}, calls)
    growing = ("insert_layers",)
    changes = {"insert_layers": "0-3"}
    assert run(tmp_path, {"value": 2}, calls, growing=growing, changes=changes) == {"value": 2}
    with pytest.raises(ValueError, match="holds another run"):
        run(tmp_path, {"value": 3}, calls, changes={"seed": 5})
    assert read_result(tmp_path) == {"value": 2}


def test_an_unfinished_part_writes_no_result(tmp_path, capsys):
    assert run(tmp_path, None, []) == {}
    assert not (tmp_path / "result.json").exists()
    assert capsys.readouterr().out == ""


def test_options_are_checked_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="--batch-size"):
        run(tmp_path / "run", {"value": 1}, [], changes={"batch_size": 0})
    assert not (tmp_path / "run").exists()
