"""A full or read-only disk ends a run with one clear line, and the same command then gives equal weights."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deepinsert.controller.options import FinetuneOptions
from deepinsert.controller.runs.storage_errors import StorageError, explain_storage_errors

ROOT = Path(__file__).parents[3]
PROGRAM = Path(__file__).with_name("failing_disk.py")
NAMESPACE = ["unshare", "--map-root-user", "--mount"]

CASES = [
    ("full", "start", 0, [], "the start"),
    ("full", "train-begin", 0, [], "the start"),  # the CSV
    ("full", "train-begin", 4096, [], "the start"),  # TensorBoard's events, once the CSV has taken its block
    ("full", "first-checkpoint", 100_000, [], "the start"),
    ("full", "checkpoint", 300_000, [1], "step 1"),
    ("full", "checkpoint", 0, [1], "step 1"),
    ("full", "manifest", 0, [1], "step 1"),
    ("full", "final-save", 5_000_000, [3, 2], "step 3"),
    ("full", "cards", 0, [3, 2], "step 3"),
    ("full", "result", 0, [3, 2], "step 3"),
    ("read-only", "start", 0, [], "the start"),
    ("read-only", "log", 0, [2, 1], "step 2"),
    ("read-only", "checkpoint", 0, [1], "step 1"),
    ("read-only", "final-save", 0, [3, 2], "step 3"),
    ("read-only", "result", 0, [3, 2], "step 3"),
]
"""Failure, moment and free bytes; the steps whose checkpoints remain; where the next run continues."""
QUICK_CASES = [CASES[number] for number in (4, 11)]


@pytest.fixture(scope="module")
def options(small_run: FinetuneOptions) -> FinetuneOptions:
    return replace(small_run, steps=3, save_every=1)


def can_mount(folder: Path) -> bool:
    """Return whether an ordinary user may mount a disk in a mount namespace here."""
    try:
        command = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def run_on_failing_disk(disk: Path, options: FinetuneOptions, cases: list[Any]) -> tuple[list[Any], str]:
    """Return the outcomes that `failing_disk.py` prints, and its stderr."""
    if not can_mount(disk.parent):
        pytest.skip("no mount namespaces for this user")
    process = subprocess.run(
        [*NAMESPACE, sys.executable, str(PROGRAM)],
        input=pickle.dumps((torch.get_num_threads(), disk, options, cases)),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert process.returncode == 0, process.stderr.decode()[-3000:]
    lines = [line for line in process.stdout.decode().splitlines() if line.startswith("{")]
    return [json.loads(line) for line in lines], process.stderr.decode()


def check_cases(disk: Path, options: FinetuneOptions, cases: list[Any]) -> None:
    """Check the message and the remaining checkpoints of each case, and the weights of the second run."""
    undisturbed = ("none", "start", 0)
    outcomes, stderr = run_on_failing_disk(disk, options, [undisturbed, *(case[:3] for case in cases)])
    whole, *interrupted = outcomes
    assert whole["error"] is None and whole["result"]
    for case, outcome in zip(cases, interrupted, strict=True):
        failure, moment, _, steps, start = case
        assert outcome["error"][0] == "StorageError", case
        message = outcome["error"][1]
        reason = "the disk is full" if failure == "full" else "it cannot be written (Read-only file system)"
        assert message.startswith(f"{disk}/{failure}-{moment}") and reason in message, message
        assert "\n" not in message and f"give the same command again: it continues from {start}" in message
        assert outcome["steps"] == steps and not outcome["result"], case
        assert outcome["sha256"] == whole["sha256"] and outcome["curve"] == whole["curve"], case
        assert not outcome["hidden"], case
    assert "Traceback" not in stderr


def test_the_same_command_ends_in_the_same_weights(options: FinetuneOptions, tmp_path: Path) -> None:
    check_cases(tmp_path / "disk", options, QUICK_CASES)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_at_every_moment(options: FinetuneOptions, tmp_path: Path, method: str) -> None:
    check_cases(tmp_path / "disk", replace(options, method=method), CASES)


def test_a_limit_on_the_size_of_files_is_named(tmp_path: Path) -> None:
    program = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from safetensors.torch import save_file\n"
        "from deepinsert.controller.runs.storage_errors import StorageError, explain_storage_errors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "folder, weights = Path(sys.argv[1]), torch.zeros(100_000)\n"
        "for save in (torch.save, lambda value, path: save_file({'a': value}, path),\n"
        "             lambda value, path: path.write_bytes(value.numpy().tobytes())):\n"
        "    try:\n"
        "        with explain_storage_errors(folder, lambda: 'Raise it.'):\n"
        "            save(weights, folder / 'weights')\n"
        "    except StorageError as error:\n"
        "        print(error)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    line = f"{tmp_path}: a file could not be written whole (a limit on the size of files, as of ulimit -f?)."
    assert process.stdout.splitlines() == [f"{line} Raise it."] * 3


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file", "data.json"),
        RuntimeError("shapes"),
        PermissionError(13, "", "/etc/x"),
    ],
)
def test_other_errors_pass_unchanged(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, explain_storage_errors(tmp_path, lambda: ""):
        raise error
    assert raised.value is error and not isinstance(raised.value, StorageError)
