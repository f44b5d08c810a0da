"""A training continues only from a checkpoint whose files are all as they were written."""

import json
import random
from pathlib import Path

import pytest

from deepinsert.controller.finetuning.checkpoints import (
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


def test_a_checkpoint_without_manifest_is_removed_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path, 3)
    broken = write_checkpoint(tmp_path, 6, complete=False)
    assert newest_complete(tmp_path, IDENTITY) == tmp_path / "checkpoint-3"
    assert not broken.exists()
    assert not caplog.records  # an unfinished checkpoint is expected after a kill


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path, 3)
    damaged = write_checkpoint(tmp_path, 6)
    (damaged / "model.safetensors").write_bytes(b"cut")
    assert newest_complete(tmp_path, IDENTITY) == tmp_path / "checkpoint-3"
    assert f"{damaged} is damaged: model.safetensors is not what was written; continuing from" in caplog.text


def test_a_checkpoint_that_cannot_be_read_is_not_removed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    (folder / MANIFEST).mkdir(parents=True)  # reading it fails, whatever its content
    with pytest.raises(IsADirectoryError):
        newest_complete(tmp_path, {})
    assert folder.is_dir()


def test_every_kind_of_damage_is_detected(tmp_path: Path) -> None:
    rng = random.Random(0)
    for trial in range(60):
        path = write_checkpoint(tmp_path / str(trial), 3)
        name = rng.choice(["model.safetensors", "inner/state.json", MANIFEST])
        content = bytearray((path / name).read_bytes())
        damage = rng.choice(["flip", "cut", "grow", "remove"])
        if damage == "flip":
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif damage == "cut":
            del content[rng.randrange(len(content)) :]
        elif damage == "grow":
            content += b"}"
        (path / name).write_bytes(content)
        if damage == "remove":
            (path / name).unlink()
        with pytest.raises(CheckpointError, match=r"damaged|not complete"):
            check_complete(path)


def test_a_checkpoint_of_another_training_is_an_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"checkpoint-3 was written with another data: .*--out"):
        newest_complete(tmp_path, {**IDENTITY, "data": "other"})


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in (3, 6, 9, 12):
        write_checkpoint(tmp_path, step)
    keep_newest(tmp_path, 2)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["checkpoint-12", "checkpoint-9"]
