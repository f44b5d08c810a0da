"""A run folder holds what repeats its run, and never two different runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepinsert.controller.options import RunOptions, SweepOptions
from deepinsert.controller.runs.folder import command_of, read_result, same_run, start_run, write_result


def sweep_options(out: Path, **changes: Any) -> SweepOptions:
    return SweepOptions(out=out, data=Path("instructions.json"), **changes)


def test_the_config_holds_what_is_needed_to_repeat_the_run(tmp_path: Path) -> None:
    out = start_run(sweep_options(tmp_path / "deep" / "run", seed=3))
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


def test_command_names_follow_the_option_classes() -> None:
    @dataclass(kw_only=True)
    class TrainPolicyOptions(RunOptions):
        pass

    assert command_of(TrainPolicyOptions(out=Path("x"))) == "train-policy"


def test_the_same_command_continues_and_another_is_refused(tmp_path: Path) -> None:
    out = start_run(sweep_options(tmp_path / "run"))
    start_run(sweep_options(tmp_path / "run", seed=5))  # the folder holds only config.json so far
    assert same_run(sweep_options(out, seed=5))
    write_result(out, {"loss": 1.0})
    start_run(sweep_options(tmp_path / "run", seed=5, device="cpu"))  # the device may change
    with pytest.raises(ValueError, match="--seed 5, now 6"):
        start_run(sweep_options(tmp_path / "run", seed=6))
    assert json.loads((out / "config.json").read_text())["seed"] == 5
    assert not same_run(sweep_options(out, seed=6))
    assert not same_run(sweep_options(tmp_path / "nothing"))


def test_results_are_valid_json_for_any_values(tmp_path: Path) -> None:
    result = {
        "loss": np.float32(0.5),
        "layers": np.arange(3),
        "unknown": float("nan"),
        "many": [np.inf, 1],
        "path": tmp_path,
        "tuple": (1, None, True),
    }
    write_result(tmp_path, result)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)
    assert content == read_result(tmp_path)
    assert content["loss"] == 0.5
    assert content["layers"] == [0, 1, 2]
    assert content["unknown"] is None
    assert content["many"] == [None, 1]
    assert content["path"] == str(tmp_path)


def test_an_unfinished_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not the folder of a finished run"):
        read_result(tmp_path)
