"""Hostile instruction files: any content gives data or a `DatasetError`; nothing outside the root opens."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from instruction_files import gpt, human, record, write_data, write_images

from deepinsert.envs.data.instructions import InstructionData, load_instructions
from deepinsert.envs.data.media import DatasetError

_opened: list[tuple[Any, int]] | None = None


def _record_opening(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append((arguments[0], arguments[2]))


sys.addaudithook(_record_opening)  # It cannot be removed; outside `opened_files` it does nothing.


@contextmanager
def opened_files() -> Iterator[list[tuple[Any, int]]]:
    """Collects (path, flags) of every file that the interpreter opens inside the block."""
    global _opened
    _opened = collected = []
    try:
        yield collected
    finally:
        _opened = None


def is_within(path: Any, flags: int, root: Path, data: Path) -> bool:
    """Whether an opened path is the data file, the root, or one component opened without following links.

    Each component is opened relative to its folder, starting at the root, so a plain name that is opened
    without following links stays below the root.
    """
    if isinstance(path, int):
        return True  # This descriptor's path was checked when it was opened.
    path = os.fsdecode(path)
    if path in (str(data), os.path.realpath(root)):
        return True
    return "/" not in path and path not in (".", "..") and bool(flags & os.O_NOFOLLOW)


HOSTILE = st.sampled_from(
    [
        "coco/1.png",
        "coco/2.png",
        "gqa/1.png",
        "fifo",
        "link.png",
        "up/secret.png",
        "absolute.png",
        "coco",
        "loop",
        "broken.png",
        "../secret.png",
        "coco/../../secret.png",
        "coco/%2e%2e/secret.png",
        "/etc/hostname",
        "//etc/hostname",
        "file:///etc/hostname",
        "http://127.0.0.1:9/a.png",
        "data:image/png;base64,AAAA",
        "..\\secret.png",
        "coco/1.png\0",
        "~/.profile",
        "$HOME/a.png",
        "",
    ]
)
PATHS = HOSTILE | st.text(max_size=20) | st.text(alphabet="./\\\0 co~1:png%", max_size=20)
TEXTS = st.text(max_size=20) | st.sampled_from(["<image>", "<image>\nWhat?", "<image><image>", "\ud800", ""])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
TURNS = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]), "value": TEXTS}) | JSON
CHATS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3).map(
    lambda pairs: [turn for question, answer in pairs for turn in (human(question), gpt(answer))]
)
RECORDS = st.fixed_dictionaries(
    {"conversations": CHATS | st.lists(TURNS, max_size=4) | JSON},
    optional={
        "id": st.integers() | st.text(max_size=5) | JSON,
        "image": PATHS | st.lists(PATHS, max_size=3) | JSON,
        "model": JSON,
    },
)
PLAIN_RECORDS = st.builds(
    lambda id, image, chat: {"id": id, "image": image, "conversations": chat},
    st.integers() | st.text(max_size=5),
    PATHS,
    CHATS,
)
FILES = (
    st.lists(PLAIN_RECORDS, min_size=1, max_size=4).map(json.dumps)
    | st.lists(RECORDS | PLAIN_RECORDS | JSON, max_size=4).map(json.dumps)
    | JSON.map(json.dumps)
    | st.text(max_size=40)
)


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose links lead to a secret image outside, with a FIFO that would block."""
    outside = tmp_path_factory.mktemp("trap")
    inside = write_images(outside / "root", "coco/1.png", "coco/2.png", "gqa/1.png")
    write_images(outside, "secret.png")
    os.mkfifo(inside / "fifo")
    (inside / "link.png").symlink_to("../secret.png")
    (inside / "up").symlink_to("..")
    (inside / "absolute.png").symlink_to(outside / "secret.png")
    (inside / "loop").symlink_to("loop")
    (inside / "broken.png").write_bytes(b"broken")
    # Python and Pillow open files of their own on first use, which the tests below must not see.
    load_instructions(write_data(outside, [record(), record("b", "broken.png")]), inside, max_bad=1)
    return inside


def data_or_error(path: Path, root: Path, max_bad: float) -> InstructionData | DatasetError:
    try:
        return load_instructions(path, root, max_bad=max_bad)
    except DatasetError as error:
        return error


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=FILES, max_bad=st.sampled_from([0.0, 0.5, 1.0]), jsonl=st.booleans())
def test_any_file_gives_data_or_a_dataset_error_and_opens_nothing_outside(
    trap: Path, content: str, max_bad: float, jsonl: bool
) -> None:
    path = trap.parent / ("data.jsonl" if jsonl else "data.json")
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with opened_files() as opened:
        outcome = data_or_error(path, trap, max_bad)
    assert opened[0][0] == str(path)
    assert [entry for entry in opened if not is_within(*entry, trap, path)] == []
    if isinstance(outcome, DatasetError):
        assert str(path) in str(outcome)
        return
    assert len(outcome) >= 1
    for item in outcome:
        assert item.turns and item.source
        for image in item.images:
            assert image in ("coco/1.png", "coco/2.png", "gqa/1.png")
        for turn in item.turns:
            (turn.question + turn.answer + item.id).encode()
    assert len(outcome.skipped) <= max_bad * (len(outcome) + len(outcome.skipped))


def test_the_audit_would_see_a_file_opened_outside(trap: Path) -> None:
    with opened_files() as opened:
        (trap / "link.png").read_bytes()
    assert not is_within(*opened[0], trap, trap.parent / "data.json")
