"""A run that is killed at any moment ends with bit-identical results, and damaged files are never used."""

import csv
import functools
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deepinsert.controller.finetuning import finetune
from deepinsert.controller.finetuning.checkpoints import checkpoint_folders
from deepinsert.controller.options import FinetuneOptions
from deepinsert.controller.runs.manifest import CARD, MANIFEST, CheckpointError, check_complete

METHODS = ("lora", "full")
KILLS = int(os.environ.get("DEEPINSERT_KILLS", "100"))
"""Number of kills, over both methods."""
TRIGGERS = {
    "any time": None,
    "first checkpoint": "training/checkpoint-1",
    "a checkpoint half written": "training/checkpoint-*/[to]*er*",
    "adapter or checkpoint being written": ".[ac]*.tmp",
    "final checkpoint there": "checkpoint/README.md",
    "result there": "result.json",
}
"""Files that a kill waits for. Half of the kills come at any time, the others in short phases of a run."""


@pytest.fixture(scope="module")
def options(small_run: FinetuneOptions) -> FinetuneOptions:
    return replace(small_run, steps=5, save_every=1)


@functools.cache
def fork_server() -> Any:
    """Return a context whose processes start with all modules imported, before any call of torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepinsert.controller.finetuning.finetune", "deepinsert.backbones"])
    return context


def run_quietly(options: FinetuneOptions) -> None:
    """Run in this process on one thread, without output."""
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    finetune.run(options)


def start(options: FinetuneOptions) -> Any:
    """Start the run in a new process."""
    process = fork_server().Process(target=run_quietly, args=(options,))
    process.start()
    return process


def outcome(out: Path) -> dict[str, Any]:
    """Return what must not depend on how often a run was killed."""
    result = json.loads((out / "result.json").read_text())
    with (out / "train_loss.csv").open(newline="") as file:
        losses = [(row["step"], row["loss"], row["grad_norm"]) for row in csv.DictReader(file)]
    folders = [out / name for name in ("checkpoint", "adapter") if (out / name).is_dir()]
    return {
        "files": {folder.name: check_complete(folder)["files"] for folder in folders},
        "losses": losses,
        "result": {name: result[name] for name in ("train_loss", "train_loss_curve", "steps")},
        "hidden": [path.name for path in out.iterdir() if path.name.startswith(".")],
        "training": (out / finetune.TRAINING).exists(),
    }


def phase(out: Path) -> str:
    """Return the phase of a run that was just killed."""
    if (out / "result.json").exists():
        return "cleaning up"
    if list(out.glob(".[ac]*.tmp")) or (out / "checkpoint").exists():
        return "final save"
    newest = next(iter(checkpoint_folders(out / finetune.TRAINING)), None)
    if newest is None:
        return "before the first checkpoint"
    return "training" if (newest / MANIFEST).exists() else "saving a checkpoint"


def run_and_kill(run: FinetuneOptions, seconds: float, rng: random.Random) -> bool:
    """Start the run and kill it at a random moment; return False if it finished before."""
    pattern = TRIGGERS[rng.choice([*(["any time"] * (len(TRIGGERS) - 2)), *TRIGGERS])]
    process = start(run)
    if pattern is None:
        process.join(rng.uniform(0, seconds))
    else:
        while process.is_alive() and not next(run.out.glob(pattern), None):
            time.sleep(0.001)
        process.join(rng.uniform(0, 0.03))
    if not process.is_alive():
        assert process.exitcode == 0
        return False
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return True


def kill_many_times(whole: FinetuneOptions, folder: Path, kills: int, rng: random.Random) -> Counter[str]:
    """Kill runs `kills` times in all, check that each ends as `whole` does, and count the kills per phase."""
    start_time = time.monotonic()
    first = start(whole)
    first.join()
    seconds = time.monotonic() - start_time
    assert first.exitcode == 0
    expected = outcome(whole.out)
    assert not expected["hidden"] and not expected["training"]
    assert len(expected["losses"]) == whole.steps
    counts: Counter[str] = Counter()
    while counts.total() < kills:
        run = replace(whole, out=folder / f"run-{counts.total()}")
        while counts.total() < kills and run_and_kill(run, seconds, rng):
            counts[phase(run.out)] += 1
        last = start(run)
        last.join()
        assert last.exitcode == 0
        assert outcome(run.out) == expected
        shutil.rmtree(run.out)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_many_kills_change_nothing(options: FinetuneOptions, tmp_path: Path, method: str) -> None:
    whole = replace(options, method=method, out=tmp_path / "whole")
    counts = kill_many_times(whole, tmp_path, KILLS // len(METHODS), random.Random(f"storm {method}"))
    print(f"\n{method}: {counts.total()} kills, {dict(counts)}")


@pytest.fixture(scope="module")
def real_folders(options: FinetuneOptions, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of interrupted runs, and the folders that finished runs leave."""
    folders = []
    for method in METHODS:
        run = replace(options, method=method, steps=3, out=tmp_path_factory.mktemp("real") / method)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(finetune, "save_variant", interrupt)
            with pytest.raises(KeyboardInterrupt):
                finetune.run(run)
        training = run.out.with_name("training")
        shutil.copytree(run.out / finetune.TRAINING, training)
        finetune.run(run)
        folders += [*checkpoint_folders(training), run.out / "checkpoint"]
        folders += [run.out / "adapter"] if method == "lora" else []
    assert len(folders) == 7
    return folders


def interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def flip(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def cut(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def overwrite(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(content))
    length = min(rng.randrange(1, 4096), len(content) - start)
    content[start : start + length] = bytes(byte ^ 0xFF for byte in content[start : start + length])


DAMAGES: list[Callable[[bytearray, random.Random], None]] = [flip, flip, cut, overwrite]


def damage_files(folders: list[Path], trials: int, rng: random.Random) -> Counter[str]:
    """Damage one file at a time: its folder is refused, and accepted again once the file is restored."""
    files = [
        (folder, path)
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != CARD and path.stat().st_size
    ]
    counts: Counter[str] = Counter()
    for trial in range(trials):
        # Every file is damaged once, then random ones.
        folder, path = files[trial] if trial < len(files) else rng.choice(files)
        good = path.read_bytes()
        bad = bytearray(good)
        damage = rng.choice(DAMAGES)
        damage(bad, rng)
        assert bad != good
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"is damaged: .* is not what was written|is not complete"):
            check_complete(folder)
        path.write_bytes(good)
        counts[f"{damage.__name__} {path.name}"] += 1
    for folder in folders:
        check_complete(folder)
    return counts


def test_damaged_checkpoints_are_refused(real_folders: list[Path]) -> None:
    damage_files(real_folders[-3:], 20, random.Random(0))


@pytest.mark.slow
def test_a_thousand_damages_are_all_refused(real_folders: list[Path]) -> None:
    counts = damage_files(real_folders, 1000, random.Random(1))
    print(f"\n{counts.total()} damages, all refused: {dict(counts)}")


def test_any_changed_byte_of_a_manifest_is_detected(real_folders: list[Path]) -> None:
    rng = random.Random(2)
    path = real_folders[0] / MANIFEST
    good = path.read_bytes()
    spaces = [position for position, byte in enumerate(good) if byte in b" \n"]
    values = [good.index(b'"step": ') + 8, good.index(b'"backbone": "') + 14, good.index(b'"bytes": ') + 9]
    for position in [*rng.sample(range(len(good)), 100), *rng.sample(spaces, 20), *values]:
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(CheckpointError, match=f"{MANIFEST} is not what was written"):
            check_complete(real_folders[0])
    path.write_bytes(good + b"\n")
    with pytest.raises(CheckpointError, match=f"{MANIFEST} is not what was written"):
        check_complete(real_folders[0])
    path.write_bytes(good)
    assert check_complete(real_folders[0])["step"] == 3


def test_files_that_the_manifest_does_not_list_are_refused(real_folders: list[Path]) -> None:
    folder = real_folders[-1]
    unlisted = folder / "adapter_model.bin"
    unlisted.write_bytes(b"a pickle that loaders would read")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin was not written with it"):
        check_complete(folder)
    unlisted.unlink()
    (folder / ".DS_Store").write_bytes(b"written by a file browser")
    (folder / CARD).write_text("a card that evaluation has added to")
    check_complete(folder)


def test_a_run_killed_after_its_last_step_repeats_none(
    options: FinetuneOptions, real_folders: list[Path], tmp_path: Path
) -> None:
    whole = replace(options, steps=3, out=tmp_path / "whole")
    finetune.run(whole)
    adapter = real_folders[3]
    assert adapter.name == "adapter"
    assert outcome(adapter.parent) == outcome(whole.out)
