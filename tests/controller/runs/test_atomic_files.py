"""A file or folder is complete or what it was before, whatever interrupts its writer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deepinsert.controller.runs.atomic_files import atomic_file, atomic_folder, save_figure, write_json


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"whole": True})

    def stop_in_the_middle() -> None:
        with atomic_file(path) as temporary:
            temporary.write_text('{"whole": fal')
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stop_in_the_middle()
    assert json.loads(path.read_text()) == {"whole": True}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"whole": True})
    program = (
        "import os, signal\n"
        "from deepinsert.controller.runs.atomic_files import atomic_file\n"
        f"with atomic_file({str(path)!r}) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.run([sys.executable, "-c", program], check=False)
    assert process.returncode == -9
    assert json.loads(path.read_text()) == {"whole": True}


def test_a_failed_write_leaves_the_old_folder_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with atomic_folder(path) as folder:
        (folder / "old").write_text("old")

    def stop_in_the_middle() -> None:
        with atomic_folder(path) as folder:
            (folder / "new").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stop_in_the_middle()
    assert [entry.name for entry in path.iterdir()] == ["old"]
    with atomic_folder(path) as folder:
        (folder / "new").write_text("new")
    assert [entry.name for entry in path.iterdir()] == ["new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_a_saved_figure_is_a_closed_png(tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    axes.plot([0, 1])
    path = save_figure(figure, tmp_path / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not plt.fignum_exists(figure.number)
