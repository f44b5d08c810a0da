"""A checkpoint counts only where every file is what was written; everything else is passed over."""

import json
import random
from pathlib import Path

import pytest

from deepinsert.controller.finetuning.checkpoints import (
    atomic_folder,
    checkpoint_folders,
    keep_newest,
    newest_complete,
)
from deepinsert.controller.runs.manifest import MANIFEST, CheckpointError, check_complete, write_manifest

IDENTITY = {"backbone": "abc", "data": "def"}


def write_checkpoint(folder: Path, step: int, complete: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(random.Random(step).randbytes(5000))
    (path / "inner" / "state.json").write_text(json.dumps({"step": step}))
    if complete:
        write_manifest(path, step=step, identity=IDENTITY)
    return path


def test_a_complete_checkpoint_is_found_by_step_not_by_name(tmp_path: Path) -> None:
    assert newest_complete(tmp_path, IDENTITY) is None
    for step in (9, 100, 20):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_complete(tmp_path, IDENTITY) == tmp_path / "checkpoint-100"


def test_a_checkpoint_without_manifest_is_removed_and_the_one_before_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path, 3)
    broken = write_checkpoint(tmp_path, 6, complete=False)
    assert newest_complete(tmp_path, IDENTITY) == tmp_path / "checkpoint-3"
    assert not broken.exists()
    assert capsys.readouterr().err == ""  # what a kill leaves is no news


def test_a_spoilt_checkpoint_is_named_and_the_one_before_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path, 3)
    spoilt = write_checkpoint(tmp_path, 6)
    (spoilt / "model.safetensors").write_bytes(b"cut")
    assert newest_complete(tmp_path, IDENTITY) == tmp_path / "checkpoint-3"
    told = f"{spoilt} is damaged: model.safetensors is not what was written; continuing from"
    assert told in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_read_is_not_removed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    (folder / MANIFEST).mkdir(parents=True)  # reading it is an error of the system, not of its content
    with pytest.raises(IsADirectoryError):
        newest_complete(tmp_path, {})
    assert folder.is_dir()


def test_every_kind_of_damage_is_seen(tmp_path: Path) -> None:
    chance = random.Random(0)
    for trial in range(60):
        path = write_checkpoint(tmp_path / str(trial), 3)
        victim = chance.choice(["model.safetensors", "inner/state.json", MANIFEST])
        content = bytearray((path / victim).read_bytes())
        damage = chance.choice(["flip", "cut", "grow", "remove"])
        if damage == "flip":
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        elif damage == "cut":
            del content[chance.randrange(len(content)) :]
        elif damage == "grow":
            content += b"}"
        (path / victim).write_bytes(content)
        if damage == "remove":
            (path / victim).unlink()
        with pytest.raises(CheckpointError, match=r"spoilt|not complete"):
            check_complete(path)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"checkpoint-3 was written with another data: .*--out"):
        newest_complete(tmp_path, {**IDENTITY, "data": "other"})


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in (3, 6, 9, 12):
        write_checkpoint(tmp_path, step)
    keep_newest(tmp_path, 2)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["checkpoint-12", "checkpoint-9"]


def test_a_replaced_folder_is_whole_or_what_it_was(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    with atomic_folder(target) as folder:
        (folder / "old").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "new").write_text("new")
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["old"]
    with atomic_folder(target) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
