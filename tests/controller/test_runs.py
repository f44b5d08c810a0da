"""Run folders: written whole or not at all, and never two runs in one folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from deepinsert.controller.options import RunOptions, SweepOptions
from deepinsert.controller.runs import folder as runs


def sweep_options(out: Path, **changes) -> SweepOptions:
    return SweepOptions(out=out, data=Path("instructions.json"), **changes)


def test_config_holds_what_is_needed_to_repeat_the_run(tmp_path):
    out = runs.start_run(sweep_options(tmp_path / "deep" / "run", seed=3))
    config = json.loads((out / "config.json").read_text())
    assert config["command"] == "sweep"
    assert config["seed"] == 3
    assert config["options"]["data"] == "instructions.json"
    assert config["options"]["insert_layers"] == "all"
    assert config["versions"]["torch"].startswith("2.")
    assert config["machine"]["cores"] >= 1
    assert config["machine"]["cpu"]
    assert config["machine"]["torch_threads"] >= 1
    assert config["machine"]["ram_gib"] > 0


def test_command_names_follow_the_option_classes():
    @dataclass(kw_only=True)
    class TrainPolicyOptions(RunOptions):
        pass

    assert runs.command_of(TrainPolicyOptions(out=Path("x"))) == "train-policy"


def test_the_same_command_continues_and_another_is_refused(tmp_path):
    out = runs.start_run(sweep_options(tmp_path / "run"))
    runs.start_run(sweep_options(tmp_path / "run", seed=5))  # nothing but config.json is there yet
    assert runs.same_run(sweep_options(out, seed=5))
    runs.write_result(out, {"loss": 1.0})
    runs.start_run(sweep_options(tmp_path / "run", seed=5, device="cpu"))  # where it runs is free
    with pytest.raises(ValueError, match="--seed 5, now 6"):
        runs.start_run(sweep_options(tmp_path / "run", seed=6))
    assert json.loads((out / "config.json").read_text())["seed"] == 5
    assert not runs.same_run(sweep_options(out, seed=6))
    assert not runs.same_run(sweep_options(tmp_path / "nothing"))


def test_results_are_valid_json_whatever_is_in_them(tmp_path):
    result = {
        "loss": np.float32(0.5),
        "layers": np.arange(3),
        "unknown": float("nan"),
        "many": [np.inf, 1],
        "path": tmp_path,
        "tuple": (1, None, True),
    }
    runs.write_result(tmp_path, result)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)
    assert read == runs.read_result(tmp_path)
    assert read["loss"] == 0.5
    assert read["layers"] == [0, 1, 2]
    assert read["unknown"] is None
    assert read["many"] == [None, 1]
    assert read["path"] == str(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "result.json"
    runs.write_json(path, {"whole": True})
    with pytest.raises(RuntimeError), runs.replacing(path) as temporary:
        temporary.write_text('{"whole": fal')
        raise RuntimeError("stopped in the middle")
    assert json.loads(path.read_text()) == {"whole": True}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    runs.write_json(tmp_path / "result.json", {"whole": True})
    program = (
        "import os, signal\n"
        "from deepinsert.controller.runs import folder as runs\n"
        f"with runs.replacing({str(tmp_path / 'result.json')!r}) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], env={**os.environ}, check=False)
    assert killed.returncode == -9
    assert runs.read_result(tmp_path) == {"whole": True}


def test_an_unfinished_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="not the folder of a finished run"):
        runs.read_result(tmp_path)


def test_progress_yields_everything_and_shows_it_on_stderr(capsys):
    assert list(runs.progress(range(4), "Counting")) == [0, 1, 2, 3]
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Counting" in shown.err and "4/4" in shown.err


def test_a_saved_figure_is_a_png(tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    axes.plot([0, 1])
    path = runs.save_figure(figure, tmp_path / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not plt.fignum_exists(figure.number)
