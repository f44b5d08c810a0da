"""Killed at any moment, a run ends in the bits of one that was not; a spoilt file never counts."""

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

ROOT = Path(__file__).parents[3]
METHODS = ("lora", "full")
KILLS = int(os.environ.get("DEEPINSERT_KILLS", "100"))
"""Kills of the storm over both methods."""
TRIGGERS = {
    "any time": None,
    "first checkpoint": "training/checkpoint-1",
    "a checkpoint half written": "training/checkpoint-*/[to]*er*",
    "adapter or checkpoint being written": ".[ac]*.tmp",
    "final checkpoint there": "checkpoint/README.md",
    "result there": "result.json",
}
"""What a kill waits for: half of them come at any time, the others right at what is over in a moment."""


@pytest.fixture(scope="module")
def options(small_run: FinetuneOptions) -> FinetuneOptions:
    return replace(small_run, steps=5, save_every=1)


@functools.cache
def server() -> Any:
    """Starts processes that have imported what finetuning needs, but run nothing of torch yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepinsert.controller.finetuning.finetune", "deepinsert.backbones"])
    return context


def run_quietly(options: FinetuneOptions) -> None:
    """The run in a process of its own, on one thread."""
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    finetune.run(options)


def start(options: FinetuneOptions) -> Any:
    process = server().Process(target=run_quietly, args=(options,))
    process.start()
    return process


def outcome(out: Path) -> dict[str, Any]:
    """What must be the same, however often a run was killed."""
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


def stage(out: Path) -> str:
    """Where a run that was just killed stood."""
    if (out / "result.json").exists():
        return "cleaning up"
    if list(out.glob(".[ac]*.tmp")) or (out / "checkpoint").exists():
        return "final save"
    newest = next(iter(checkpoint_folders(out / finetune.TRAINING)), None)
    if newest is None:
        return "before the first checkpoint"
    return "training" if (newest / MANIFEST).exists() else "saving a checkpoint"


def kill_some_time(run: FinetuneOptions, seconds: float, chance: random.Random) -> bool:
    """Start the run and kill it at a random moment; False where it finished before."""
    pattern = TRIGGERS[chance.choice([*(["any time"] * (len(TRIGGERS) - 2)), *TRIGGERS])]
    process = start(run)
    if pattern is None:
        process.join(chance.uniform(0, seconds))
    else:
        while process.is_alive() and not next(run.out.glob(pattern), None):
            time.sleep(0.001)
        process.join(chance.uniform(0, 0.03))
    if not process.is_alive():
        assert process.exitcode == 0
        return False
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return True


def storm(whole: FinetuneOptions, folder: Path, kills: int, chance: random.Random) -> Counter[str]:
    """Runs killed `kills` times in all, each of which ends as `whole` does; counts by where kills fell."""
    begun = time.monotonic()
    first = start(whole)
    first.join()
    seconds = time.monotonic() - begun
    assert first.exitcode == 0
    expected = outcome(whole.out)
    assert not expected["hidden"] and not expected["training"]
    assert len(expected["losses"]) == whole.steps
    fallen: Counter[str] = Counter()
    while fallen.total() < kills:
        run = replace(whole, out=folder / f"run-{fallen.total()}")
        while fallen.total() < kills and kill_some_time(run, seconds, chance):
            fallen[stage(run.out)] += 1
        last = start(run)
        last.join()
        assert last.exitcode == 0
        assert outcome(run.out) == expected
        shutil.rmtree(run.out)
    return fallen


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_storm_of_kills_changes_nothing(options: FinetuneOptions, tmp_path: Path, method: str) -> None:
    whole = replace(options, method=method, out=tmp_path / "whole")
    fallen = storm(whole, tmp_path, KILLS // len(METHODS), random.Random(f"storm {method}"))
    print(f"\n{method}: {fallen.total()} kills, {dict(fallen)}")


@pytest.fixture(scope="module")
def real_folders(options: FinetuneOptions, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of interrupted runs, and what finished ones leave."""
    folders = []
    for method in METHODS:
        run = replace(options, method=method, steps=3, out=tmp_path_factory.mktemp("real") / method)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(finetune, "save_variant", interrupt)
            finetune.run(run)
        kept = run.out.with_name("training")
        shutil.copytree(run.out / finetune.TRAINING, kept)
        finetune.run(run)
        folders += [*checkpoint_folders(kept), run.out / "checkpoint"]
        folders += [run.out / "adapter"] if method == "lora" else []
    assert len(folders) == 7
    return folders


def interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def flip(content: bytearray, chance: random.Random) -> None:
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def cut(content: bytearray, chance: random.Random) -> None:
    del content[chance.randrange(len(content)) :]


def overwrite(content: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(content))
    length = min(chance.randrange(1, 4096), len(content) - start)
    content[start : start + length] = bytes(byte ^ 0xFF for byte in content[start : start + length])


DAMAGES: list[Callable[[bytearray, random.Random], None]] = [flip, flip, cut, overwrite]


def spoil_some_files(folders: list[Path], trials: int, chance: random.Random) -> Counter[str]:
    """Damage one file at a time; every folder must be refused, and be whole again when it is put back."""
    files = [
        (folder, path)
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != CARD and path.stat().st_size
    ]
    counts: Counter[str] = Counter()
    for trial in range(trials):
        # Every file has its turn, then any: manifests are small, and must not be missed.
        folder, path = files[trial] if trial < len(files) else chance.choice(files)
        good = path.read_bytes()
        bad = bytearray(good)
        damage = chance.choice(DAMAGES)
        damage(bad, chance)
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
    spoil_some_files(real_folders[-3:], 20, random.Random(0))


@pytest.mark.slow
def test_a_thousand_damages_are_all_refused(real_folders: list[Path]) -> None:
    counts = spoil_some_files(real_folders, 1000, random.Random(1))
    print(f"\n{counts.total()} damages, all refused: {dict(counts)}")


def test_any_changed_byte_of_a_manifest_is_noticed(real_folders: list[Path]) -> None:
    chance = random.Random(2)
    path = real_folders[0] / MANIFEST
    good = path.read_bytes()
    spaces = [place for place, byte in enumerate(good) if byte in b" \n"]
    facts = [good.index(b'"step": ') + 8, good.index(b'"backbone": "') + 14, good.index(b'"bytes": ') + 9]
    for place in [*chance.sample(range(len(good)), 100), *chance.sample(spaces, 20), *facts]:
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(CheckpointError, match=f"{MANIFEST} is not what was written"):
            check_complete(real_folders[0])
    path.write_bytes(good + b"\n")
    with pytest.raises(CheckpointError, match=f"{MANIFEST} is not what was written"):
        check_complete(real_folders[0])
    path.write_bytes(good)
    assert check_complete(real_folders[0])["step"] == 3


def test_files_that_were_not_written_with_it_are_refused(real_folders: list[Path]) -> None:
    folder = real_folders[-1]
    stranger = folder / "adapter_model.bin"
    stranger.write_bytes(b"a pickle that loaders would take")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin was not written with it"):
        check_complete(folder)
    stranger.unlink()
    (folder / ".DS_Store").write_bytes(b"a file browser's")
    (folder / CARD).write_text("a card that evaluation has added to")
    check_complete(folder)


def test_a_run_killed_after_its_last_step_plays_none_again(
    options: FinetuneOptions, real_folders: list[Path], tmp_path: Path
) -> None:
    whole = replace(options, steps=3, out=tmp_path / "whole")
    finetune.run(whole)
    adapter = real_folders[3]
    assert adapter.name == "adapter"
    assert outcome(adapter.parent) == outcome(whole.out)
