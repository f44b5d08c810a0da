"""Selection of records: by source, by seeded fraction, and into a split without common images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from instruction_files import gpt, human, record, write_data, write_images

from deepinsert.envs.data.instructions import Record, load_instructions, split_by_image
from deepinsert.envs.data.media import DatasetError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_images(
        tmp_path / "root", "coco/1.png", "coco/2.png", "coco/train2017/3.png", "gqa/1.png", "4.png"
    )


# Sources and fractions.


def test_sources_go_by_path_prefix(root: Path) -> None:
    images = ["coco/1.png", "./coco/train2017/3.png", "gqa/1.png", "4.png", None]
    turns = (human("Hi"), gpt("Hello"))
    path = write_data(root, [record(str(number), image, *turns) for number, image in enumerate(images)])

    def selected_ids(*sources: str) -> str:
        return "".join(item.id for item in load_instructions(path, sources=sources))

    assert selected_ids("coco") == "01"
    assert selected_ids("coco/train2017") == "1"
    assert selected_ids("text", "gqa") == "24"
    assert selected_ids(".") == "3"
    with pytest.raises(DatasetError, match=r"'coc'; the sources are: coco \(2\), .*text \(1\)"):
        selected_ids("coco", "coc")


def test_fraction_is_seeded_nested_and_independent_of_order(root: Path) -> None:
    items = [record(f"{number}", None, human(f"{number}?"), gpt("Yes")) for number in range(200)]

    def selected_ids(content: list[Any], fraction: float, seed: int = 0) -> set[str]:
        data = load_instructions(write_data(root, content), fraction=fraction, seed=seed)
        assert [item.index for item in data] == sorted(item.index for item in data)
        return {item.id for item in data}

    tenth = selected_ids(items, 0.1)
    assert len(tenth) == 20 and tenth == selected_ids(items, 0.1)
    assert tenth == selected_ids(items[::-1], 0.1)
    assert tenth < selected_ids(items, 0.2)
    assert tenth != selected_ids(items, 0.1, seed=1)
    assert len(selected_ids(items, 1e-9)) == 1
    for fraction in (0, -1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="fraction"):
            selected_ids(items, fraction)


def test_fraction_after_sources_does_not_depend_on_other_sources(root: Path) -> None:
    coco = [record(f"c{number}") for number in range(40)]
    text = [record(f"t{number}", None) for number in range(40)]
    alone = load_instructions(write_data(root, coco), sources=("coco",), fraction=0.25)
    mixed = load_instructions(write_data(root, text + coco), sources=("coco",), fraction=0.25)
    assert len(alone) == 10 and {item.id for item in alone} == {item.id for item in mixed}


def test_fraction_selects_all_records_of_an_image(root: Path) -> None:
    items = [
        record(f"{image}-{turn}", f"coco/{image}.jpg", human(f"<image>\n{turn}?"), gpt("Yes"))
        for turn in range(5)
        for image in range(40)
    ]
    write_images(root, *(f"coco/{image}.jpg" for image in range(40)))
    quarter = load_instructions(write_data(root, items), fraction=0.25)
    counts = Counter(item.image_key for item in quarter)
    assert len(quarter) == 50 and set(counts.values()) == {5}
    more = load_instructions(write_data(root, items), fraction=0.26)
    assert sorted(Counter(item.image_key for item in more).values()) == [2, *[5] * 10]
    assert {item.id for item in quarter} < {item.id for item in more}


# Splitting.


def items_of(*images: tuple[str, ...]) -> list[Record]:
    return [Record(f"r{index}", names, (), "coco", index) for index, names in enumerate(images)]


def test_records_that_share_an_image_stay_together() -> None:
    chain = [(f"coco/{number}", f"coco/{number + 1}") for number in range(5)]
    items = items_of(*chain, ("gqa/1",), ("gqa/1",), (), (), ("coco/9",))
    for seed in range(20):
        train, held_out = split_by_image(items, held_out=0.5, seed=seed)
        assert len(train) + len(held_out) == len(items) and train and held_out
        assert len(held_out) <= 5
        for group in (range(5), (5, 6)):
            assert sum(items[index] in train for index in group) in (0, len(group))


def test_a_split_is_seeded_and_independent_of_order() -> None:
    items = items_of(*[(f"coco/{number // 3}",) for number in range(60)])

    def held_out_ids(seed: int, order: int = 1) -> set[str]:
        return {item.id for item in split_by_image(items[::order], seed=seed)[1]}

    assert len(held_out_ids(0)) == 15
    assert held_out_ids(0) == held_out_ids(0) == held_out_ids(0, order=-1)
    assert held_out_ids(0) != held_out_ids(1)


def test_no_side_is_empty_where_possible() -> None:
    pair = items_of(("a/1",), ("a/1",), ("a/1",), ("a/2",), ("a/2",))
    for share in (0.01, 0.5, 0.99):
        train, held_out = split_by_image(pair, held_out=share)
        assert train and held_out
    assert split_by_image(pair[:3]) == (pair[:3], [])
    assert split_by_image([]) == ([], [])
    assert split_by_image(pair, held_out=0) == (pair, [])
    assert split_by_image(pair, held_out=1) == ([], pair)
    with pytest.raises(ValueError, match="held_out 2"):
        split_by_image(pair, held_out=2)
