"""A sweep's table is the same to the last bit if the sweep is split, killed, resumed or extended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from deepinsert.controller.options import SweepOptions
from deepinsert.controller.policy import sweep
from deepinsert.envs import RewardTable
from deepinsert.envs.rewards.group_forward import GroupForward

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def data(rendered_data, tmp_path_factory):
    """Records for several groups; the first record of each source occurs again under another id."""
    records = json.loads(rendered_data.read_text())
    first = {record.get("image", "text").split("/")[0]: record for record in reversed(records)}
    again = [{**record, "id": f"again-{record['id']}"} for record in first.values()]
    path = tmp_path_factory.mktemp("some") / "instructions.json"
    path.write_text(json.dumps(records + again))
    return path


@pytest.fixture(scope="module")
def options_for(data, rendered_data):
    def make(out, **changed):
        return SweepOptions(
            **{
                "data": data,
                "image_root": rendered_data.parent,
                "out": out,
                "insert_layers": "0,3,8",
                "agreement": True,
                "shard_prompts": 4,
                "device": "cpu",
                **changed,
            }
        )

    return make


@pytest.fixture(scope="module")
def whole(options_for, tmp_path_factory):
    """A sweep by one process, in one shard."""
    out = tmp_path_factory.mktemp("whole")
    sweep.run(options_for(out, shard_prompts=1024))
    return out


def command(options, **environment):
    """Return the words and the environment of a process that runs the same sweep."""
    arguments = []
    for name, value in vars(options).items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments += [f"--{option}" if value else f"--no-{option}"]
        elif value not in (None, ""):
            arguments += [f"--{option}", str(value)]
    words = [sys.executable, "-m", "deepinsert.controller.cli", "sweep", *arguments]
    return words, {**ENVIRONMENT, **environment}


def start(options, **environment):
    words, variables = command(options, **environment)
    return subprocess.Popen(words, env=variables, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(process):
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    return output, errors


def shards(folder):
    return sorted(path for path in folder.glob("losses-*.parquet"))


def assert_same(out, whole):
    """Assert that table and result are equal to the last bit."""
    table, expected = RewardTable.load(out / "table"), RewardTable.load(whole / "table")
    assert table.prompt_ids == expected.prompt_ids and table.insert_layers == expected.insert_layers
    for name in ("losses", "correct", "agreement", "greedy", "flops", "stock_flops"):
        np.testing.assert_array_equal(getattr(table, name), getattr(expected, name), err_msg=name)
    assert table.complete and table.digest == expected.digest
    assert (out / "result.json").read_bytes() == (whole / "result.json").read_bytes()


def test_parts_one_after_the_other(options_for, whole, tmp_path, capsys):
    for part in (1, 0):
        assert sweep.run(options_for(tmp_path, shard=f"{part}/3")) == {}
        assert not (tmp_path / "result.json").exists()
    assert "--shard 2/3" in capsys.readouterr().err.splitlines()[-1]
    write_times = {path: path.stat().st_mtime_ns for path in shards(tmp_path / "table")}
    sweep.run(options_for(tmp_path, shard="2/3"))
    assert_same(tmp_path, whole)
    assert len(write_times) > 2
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in write_times.items())
    again = sweep.run(options_for(tmp_path, shard="0/3"))
    assert again == json.loads((whole / "result.json").read_text())


def test_two_processes_under_torchrun(options_for, whole, tmp_path):
    (python, *words), variables = command(options_for(tmp_path))
    launched = [python, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", *words]
    completed = subprocess.run(
        launched, env=variables, capture_output=True, text=True, timeout=500, check=False
    )
    assert completed.returncode == 0, completed.stderr
    assert "sweep 0/2" in completed.stderr and "sweep 1/2" in completed.stderr
    assert_same(tmp_path, whole)


def test_a_killed_sweep_continues(options_for, whole, tmp_path):
    options = options_for(tmp_path)
    process = start(options)
    table = tmp_path / "table"
    while len(shards(table)) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    write_times = {path: path.stat().st_mtime_ns for path in shards(table)}
    assert not (tmp_path / "result.json").exists()
    assert not RewardTable.load(table).complete
    sweep.run(options)
    assert_same(tmp_path, whole)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in write_times.items())


def test_layers_prompts_and_figures_are_added_in_the_same_folder(options_for, whole, tmp_path):
    few = {"insert_layers": "3", "accuracy": False, "agreement": False, "fraction": 0.4}
    first = sweep.run(options_for(tmp_path, **few))
    assert first["insert_layers"] == [3] and first["by_layer"][0]["accuracy"] is None
    assert sweep.run(options_for(tmp_path, **few)) == json.loads((tmp_path / "result.json").read_text())
    sweep.run(options_for(tmp_path, **{**few, "insert_layers": "0,3"}))
    sweep.run(options_for(tmp_path, **{**few, "insert_layers": "0,3", "fraction": 1.0}))
    sweep.run(options_for(tmp_path, insert_layers="8", sources="coco,text"))
    sweep.run(options_for(tmp_path))
    assert_same(tmp_path, whole)


def test_sweeps_share_a_table(options_for, whole, tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    sweep.run(options_for(tmp_path / "first", table=shared))
    monkeypatch.setattr(GroupForward, "run", None)  # every loss is known
    sweep.run(options_for(tmp_path / "second", table=shared))
    assert (tmp_path / "second" / "result.json").read_bytes() == (whole / "result.json").read_bytes()
    sweep.run(options_for(tmp_path / "third", table=shared, insert_layers="0,8"))


def test_a_damaged_shard_is_named_and_computed_again(options_for, whole, tmp_path):
    sweep.run(options_for(tmp_path))
    (tmp_path / "result.json").unlink()
    shard = shards(tmp_path / "table")[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(ValueError, match=f"{shard.name} is damaged.*remove it"):
        sweep.run(options_for(tmp_path))
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        RewardTable.load(tmp_path / "table")
    sweep.run(options_for(tmp_path))
    assert_same(tmp_path, whole)


def test_other_batch_tokens_do_not_mix(options_for, whole, tmp_path):
    """Losses computed with another `batch_tokens` are rounded differently, so they are computed again."""
    shared = tmp_path / "shared"
    sweep.run(options_for(tmp_path / "small", table=shared, batch_tokens=512, accuracy=False))
    sweep.run(options_for(tmp_path / "usual", table=shared))
    assert (tmp_path / "usual" / "result.json").read_bytes() == (whole / "result.json").read_bytes()


PARENT = """
import json, os, signal, sys
import torch, transformers, matplotlib.pyplot, pyarrow.parquet
from deepinsert.controller import cli
from deepinsert.controller.policy import sweep
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    words, environment = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        os.environ.update(environment)
        cli.main(words)
        os._exit(0)
    print(pid, flush=True)
"""


@pytest.fixture
def fork_command():
    """A function that starts a command as a process, without the time of imports, and returns its id."""
    words = [sys.executable, "-c", PARENT]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, env=ENVIRONMENT, text=True, **pipes) as parent:

        def fork(words, **environment):
            parent.stdin.write(json.dumps([words, environment]) + "\n")
            parent.stdin.flush()
            return int(parent.stdout.readline())

        yield fork
        parent.stdin.close()


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_fifty_kills(options_for, whole, tmp_path, fork_command):
    """Two processes at a time are killed at random moments after one of them has written a shard."""
    rng = np.random.default_rng(0)
    options, table, kills = options_for(tmp_path, shard_prompts=1), tmp_path / "table", 0
    words = command(options)[0][3:]
    while kills < 50:
        before = shards(table)
        parts = [fork_command(words, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
        while shards(table) == before and any(map(is_alive, parts)):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 1))
        for pid in filter(is_alive, parts):
            os.kill(pid, signal.SIGKILL)
            kills += 1
        while any(map(is_alive, parts)):
            time.sleep(0.005)
        part = RewardTable.load(table)
        if part.complete and part.known_correct is not None:  # all is done: remove most of it
            for path in shards(table):
                if rng.random() < 0.7:
                    path.unlink()
            (table / "_manifest.json").unlink(missing_ok=True)
            (tmp_path / "result.json").unlink(missing_ok=True)
    finish(start(options))
    assert_same(tmp_path, whole)
