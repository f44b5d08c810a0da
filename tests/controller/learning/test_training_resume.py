"""Training that is killed by `kill -9` repeatedly ends in the same bits as an uninterrupted one."""

import functools
import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from synthetic_tables import clustered_table

from deepinsert.controller.learning.train_policy import run, train_policy
from deepinsert.controller.learning.training_state import StateFile
from deepinsert.controller.options import TrainPolicyOptions
from deepinsert.controller.policy.layer_policy import LayerPolicy

ALGORITHMS = {"ppo": 6_144, "a2c": 3_072, "dqn": 4_096, "full-info": 40_000}
STATE_SECONDS = 0.02


@functools.cache
def server():
    """Return a context whose processes have imported what training needs but have run no torch code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepinsert.controller.learning.train_policy", "deepinsert.backbones"])
    return context


def start(function, *args, **kwargs):
    process = server().Process(target=function, args=args, kwargs=kwargs)
    process.start()
    return process


def kill_until_done(begin, seconds, most, rng):
    """Start a process with `begin` and kill it within `seconds`, at most `most` times, until one finishes.

    Returns the number of kills.
    """
    kills = 0
    while True:
        process = begin()
        process.join(rng.uniform(0.05, seconds) if kills < most else None)
        if not process.is_alive():
            assert process.exitcode == 0
            return kills
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1


def trained(algorithm, state, **options):
    table, observations = clustered_table(prompts=200)
    return train_policy(
        table,
        observations,
        algorithm=algorithm,
        skip_weights=(0.0, 1.0),
        steps=ALGORITHMS[algorithm],
        seed=5,
        state=state,
        state_seconds=STATE_SECONDS,
        **options,
    )


@functools.cache
def undisturbed(algorithm):
    return trained(algorithm, None).network


def same(first, second):
    return all(
        torch.equal(one, other)
        for layer, twin in zip(first, second, strict=True)
        for one, other in zip(layer, twin, strict=True)
    )


def storm(algorithm, folder, most, rng):
    """Kill a training up to `most` times, check its final bits, and return the number of kills."""
    table, observations = clustered_table(prompts=200)
    state = folder / "state.safetensors"
    options = dict(skip_weights=(0.0, 1.0), seed=5, state=state, state_seconds=STATE_SECONDS)
    options.update(algorithm=algorithm, steps=ALGORITHMS[algorithm])
    start_time = time.monotonic()
    whole = start(train_policy, table, observations, **{**options, "state": folder / "whole.safetensors"})
    whole.join()
    seconds = time.monotonic() - start_time
    kills = kill_until_done(lambda: start(train_policy, table, observations, **options), seconds, most, rng)
    assert same(trained(algorithm, state).network, undisturbed(algorithm))
    assert not list(folder.glob(".*.tmp"))  # written in part before a kill
    return kills


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_killed_training_ends_in_the_same_bits(algorithm, tmp_path):
    storm(algorithm, tmp_path, most=2, rng=random.Random(0))


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    rng, kills = random.Random(0), 0
    for number, algorithm in enumerate(itertools.cycle(ALGORITHMS)):
        folder = tmp_path / str(number)
        folder.mkdir()
        kills += storm(algorithm, folder, most=50, rng=rng)
        if kills >= 50:
            break


class Stopped(Exception):
    """Replaces the kill in tests that need it at a certain place."""


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_goes_on_from_its_last_state(algorithm, tmp_path, monkeypatch):
    path, saves_left = tmp_path / "state.safetensors", [2]
    save = StateFile.save

    def save_and_stop(self, content):
        save(self, content)
        saves_left[0] -= 1
        if not saves_left[0]:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "save", save_and_stop)
        with pytest.raises(Stopped):
            trained(algorithm, path)
    assert same(trained(algorithm, path, log_folder=tmp_path).network, undisturbed(algorithm))
    trained(algorithm, None, log_folder=tmp_path / "whole")
    assert (tmp_path / "progress.csv").read_text() == (tmp_path / "whole" / "progress.csv").read_text()
    # a finished training does not start again
    monkeypatch.setattr(StateFile, "save", None)
    assert same(trained(algorithm, path).network, undisturbed(algorithm))


def test_state_holds_everything_bit_for_bit(tmp_path):
    content = {
        "tuple": (1, 2.5, None, True, "text", float("inf")),
        3: [np.arange(4, dtype=np.uint8), torch.tensor(0.1)],
        "big": 2**127 + 1,
        "generator": np.random.default_rng(0).bit_generator.state,
        "python": random.getstate(),
        "empty": np.zeros((0, 3)),
    }
    file = StateFile(tmp_path / "state", {"seed": 1})
    assert file.load() is None
    file.save(content)
    loaded = file.load()
    assert repr(loaded) == repr(content)
    assert loaded[3][0].dtype == np.uint8 and torch.equal(loaded[3][1], torch.tensor(0.1))


def test_state_of_another_training_is_refused(tmp_path):
    StateFile(tmp_path / "state", {"seed": 1, "losses": "a"}).save([1])
    with pytest.raises(ValueError, match=r"with losses a, not b; remove it"):
        StateFile(tmp_path / "state", {"seed": 1, "losses": "b"}).load()


@pytest.mark.parametrize("damage", ["cut", "bit", "foreign", "empty", "checksum"])
def test_damaged_state_is_refused(tmp_path, damage):
    path = tmp_path / "state"
    file = StateFile(path, {})
    file.save({"weights": torch.arange(100.0)})
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[:-7]
    elif damage == "bit":
        data[-5] ^= 1
    elif damage == "empty":
        data = b""
    elif damage == "foreign":
        data = safetensors.torch.save({"a": torch.zeros(2)})
    else:
        data = bytes(data).replace(b"weights", b"weighty")
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"is not a training state .*; remove it to train from the beginning"
    ):
        file.load()


@pytest.fixture(scope="module")
def killed_options(tmp_path_factory, rendered_data):
    """Options of a short command; the reward table is shared, so that kills happen in training."""
    return TrainPolicyOptions(
        out=tmp_path_factory.mktemp("run"),
        data=rendered_data,
        fraction=0.4,
        insert_layers="0,3,6",
        seeds=2,
        steps=8192,
        device="cpu",
        table=tmp_path_factory.mktemp("table"),
    )


@pytest.mark.parametrize(
    "algorithm", [pytest.param(name, marks=[] if name == "ppo" else pytest.mark.slow) for name in ALGORITHMS]
)
def test_killed_command_ends_in_the_same_files(algorithm, killed_options, tmp_path):
    steps = ALGORITHMS[algorithm]
    whole = replace(killed_options, algorithm=algorithm, steps=steps, out=tmp_path / "whole")
    start_time = time.monotonic()
    run(whole)
    seconds = time.monotonic() - start_time
    killed = replace(whole, out=tmp_path / "killed")
    kill_until_done(lambda: start(run, killed), seconds, 2, random.Random(1))
    for name in ("policy.json", "policy.safetensors", "judgement.md", "progress.csv", "result.json"):
        assert (killed.out / name).read_bytes() == (whole.out / name).read_bytes(), name
    assert len(json.loads((killed.out / "result.json").read_text())["seeds"]["each"]) == 2
    assert LayerPolicy.load(killed.out).algorithm == algorithm
