"""Rendered instructions: reproducible by seed, disjoint between the sides of the split, and correct."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from deepinsert.envs.data.instructions import load_instructions
from deepinsert.envs.data.rendering import (
    COLOURS,
    KINDS,
    PLACES,
    SOURCES,
    draw_scene,
    kind_of,
    questions,
    render,
    render_instructions,
    side_of,
)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pictures(folder: Path) -> set[bytes]:
    return {content for name, content in files(folder).items() if name.endswith(".png")}


def test_equal_seeds_write_equal_files(tmp_path):
    for name in ("one", "other"):
        render_instructions(tmp_path / name, images=12, seed=3)
    assert files(tmp_path / "one") == files(tmp_path / "other")


def test_other_seeds_and_other_sides_share_no_picture(tmp_path):
    render_instructions(tmp_path / "one", images=60, seed=3)
    render_instructions(tmp_path / "seed", images=60, seed=4)
    render_instructions(tmp_path / "side", images=60, seed=3, side="train")
    one, seed, side = (pictures(tmp_path / name) for name in ("one", "seed", "side"))
    assert len(one) == len(seed) == len(side) == 60
    assert not one & seed and not one & side


@pytest.mark.parametrize("source", SOURCES)
def test_a_scene_is_on_one_side(source):
    rng = random.Random(0)
    train = [draw_scene(source, rng, "train") for _ in range(200)]
    held_out = [draw_scene(source, rng, "held_out") for _ in range(200)]
    assert {side_of(scene) for scene in train} == {"train"}
    assert {side_of(scene) for scene in held_out} == {"held_out"}
    samples = [
        {item.sample for scene in scenes for item in scene.items} - {-1} for scenes in (train, held_out)
    ]
    assert not samples[0] & samples[1]


def test_the_reader_accepts_all_records(tmp_path):
    data = load_instructions(render_instructions(tmp_path, images=30, seed=0), max_bad=0.0)
    ids = [record.id for record in data]
    assert len(set(ids)) == len(ids) and not data.skipped
    assert {record.source for record in data} == {*SOURCES, "text"}
    assert any(len(record.turns) == 3 for record in data)
    kinds = {kind for source in SOURCES for kind in KINDS[source]} | {"dialogue", "sum", "opposite", "thing"}
    assert {kind_of(name) for name in ids} <= kinds
    for record in json.loads((tmp_path / "instructions.json").read_text()):
        marks = [turn["value"].count("<image>") for turn in record["conversations"]]
        assert sum(marks) == marks[0] == ("image" in record)


def test_answers_agree_with_the_pixels():
    """The foreground's mean colour, mean position and extent agree with the answers about a single shape."""
    rng = random.Random(1)
    count = 0
    while count < 40:
        scene = draw_scene("gqa", rng, "train")
        if len(scene.items) != 1:
            continue
        count += 1
        pixels = np.asarray(render(scene)).astype(int)
        foreground = np.abs(pixels - np.array(scene.background)).sum(-1) > 0
        answers = {q.kind: q.answer for q in questions(scene, rng, ["color", "place", "size"])}
        distances = {name: np.abs(pixels[foreground].mean(0) - rgb).sum() for name, rgb in COLOURS.items()}
        assert min(distances, key=distances.__getitem__) == answers["color"]
        rows, columns = np.nonzero(foreground)
        assert PLACES[2 * (rows.mean() >= 32) + (columns.mean() >= 32)] == answers["place"]
        assert ("large" if np.ptp(columns) > 18 else "small") == answers["size"]


def test_counts_and_relations_follow_from_the_scene():
    rng = random.Random(2)
    for _ in range(100):
        scene = draw_scene("gqa", rng, "train")
        by_name = {f"{item.colour} shape": item for item in scene.items}
        by_name |= {
            item.what: item for item in scene.items if [i.what for i in scene.items].count(item.what) == 1
        }
        for question in questions(scene, rng):
            if question.text == "How many shapes are there?":
                assert question.answer == str(len(scene.items))
            if question.kind == "relation":
                middle = " left or right of the " if " left or " in question.text else " above or below the "
                names = question.text.removeprefix("Is the ").removesuffix("?").split(middle)
                one, other = (by_name[name].place for name in names)
                first = one % 2 < other % 2 if " left or " in question.text else one // 2 < other // 2
                assert question.answer == middle.split()[0 if first else 2]
