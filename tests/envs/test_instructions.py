"""Instruction files: records in the forms that LLaVA publishes load; any other file is a `DatasetError`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from instruction_files import gpt, human, record, write_data, write_images

from deepinsert.envs.data.instructions import InstructionData, Record, Turn, load_instructions, split_by_image
from deepinsert.envs.data.media import DatasetError

EASY_VQA = Path(__file__).parents[3] / "shared" / "data" / "easy_vqa" / "train.json"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_images(
        tmp_path / "root", "coco/1.png", "coco/2.png", "coco/train2017/3.png", "gqa/1.png", "4.png"
    )


# Records in the forms that LLaVA's mix has.


def test_records_as_llava_publishes_them(root: Path) -> None:
    items = [
        record(
            "000000033471", "coco/1.png", human("<image>\nColour?"), gpt("Red."), human("Sure?"), gpt("Yes.")
        ),
        {**record("wgByO4Y_0", None, human("What is <image> in SVG?"), gpt("An element.")), "model": "gpt-4"},
        record(17, "gqa/1.png", human("Where?\n<image>"), gpt("Left")),
        record(17, ["coco/1.png", "coco/2.png"], human("<image>\n<image>\nSame?"), gpt("No")),
        record("late", ["./coco//1.png"], human("Hello"), gpt("Hi"), human("<image>What?"), gpt("A cat")),
        {"image": None, "conversations": [human("Hi"), gpt("Hello")]},
        record("bare", "4.png"),
    ]
    data = load_instructions(write_data(root, items))
    assert len(data) == 7 and data.skipped == [] and data.notes == {}
    assert data[0] == Record(
        "000000033471",
        ("coco/1.png",),
        (Turn("<image>\nColour?", "Red."), Turn("Sure?", "Yes.")),
        "coco",
        0,
    )
    assert data[1].images == () and data[1].source == "text" and "<image>" in data[1].turns[0].question
    assert [item.id for item in data] == ["000000033471", "wgByO4Y_0", "17", "17", "late", "5", "bare"]
    assert data[3].images == ("coco/1.png", "coco/2.png") and data[3].image_key == "coco/1.png\ncoco/2.png"
    assert data[4].images == ("coco/1.png",)
    assert data[6].source == "."
    assert data.root == root and data[5].image_key == "5"


def test_unpaired_turns_are_repaired_or_skipped_and_counted(root: Path) -> None:
    items = [
        record("leading", None, gpt("Welcome"), human("Hi"), gpt("Hello")),
        record("trailing", None, human("Hi"), gpt("Hello"), human("Bye")),
        record("unmarked", "coco/1.png", human("What?"), gpt("A cat")),
        record("twice", None, human("Hi"), human("Hi?"), gpt("Hello")),
        record("alone", None, human("Hi")),
        record("unanswered", None, human("Hi"), human("Hi?")),
        {"id": "empty", "conversations": []},
        record("marks", "coco/1.png", human("<image><image>"), gpt("A cat")),
    ]
    data = load_instructions(write_data(root, items), max_bad=0.7)
    assert [item.id for item in data] == ["leading", "trailing", "unmarked"]
    assert data[0].turns == data[1].turns == (Turn("Hi", "Hello"),)
    assert data.notes == {
        "leading gpt turn dropped": 1,
        "trailing human turn dropped": 1,
        "images without an <image> mark put before the first question": 1,
    }
    assert [(item.id, item.index, item.field) for item in data.skipped] == [
        ("twice", 3, "conversations"),
        ("alone", 4, "conversations"),
        ("unanswered", 5, "conversations"),
        ("empty", 6, "conversations"),
        ("marks", 7, "image"),
    ]
    assert data.skipped[-1].reason == "2 <image> marks for 1 images"


def test_json_lines_load_too(root: Path) -> None:
    lines = "\n".join(json.dumps(record(str(number), None)) for number in range(3)) + "\n\n"
    data = load_instructions(write_data(root, lines, "data.jsonl"))
    assert [item.id for item in data] == ["0", "1", "2"]
    with pytest.raises(DatasetError, match=r"data\.jsonl, line 2: not JSON"):
        load_instructions(write_data(root, lines.split("\n")[0] + "\n{", "data.jsonl"))


def test_a_file_with_a_byte_order_mark_loads(root: Path) -> None:
    assert len(load_instructions(write_data(root, "\ufeff" + json.dumps([record()])))) == 1


@pytest.mark.skipif(not EASY_VQA.exists(), reason="the real easy-VQA files are not beside this checkout")
def test_real_easy_vqa_loads() -> None:
    data = load_instructions(EASY_VQA, fraction=0.02)
    assert len(data) == round(0.02 * 38_575) and data.skipped == []
    train, held_out = split_by_image(data)
    assert isinstance(held_out, InstructionData) and held_out.root == EASY_VQA.parent
    assert not {item.image_key for item in train} & {item.image_key for item in held_out}


# Images that cannot be used.


def test_bad_images_are_listed_up_to_max_bad(root: Path) -> None:
    (root / "coco" / "broken.png").write_bytes(b"broken")
    names = ["coco/none.png", "coco/broken.png", "../out.png", "https://x.org/a.png", ""]
    items = [record(f"good{number}") for number in range(15)]
    items += [record(f"bad{number}", name) for number, name in enumerate(names)]
    path = write_data(root, items)
    data = load_instructions(path, max_bad=0.25)
    assert len(data) == 15
    assert [(bad.id, bad.index, bad.field) for bad in data.skipped] == [
        (f"bad{number}", 15 + number, "image") for number in range(5)
    ]
    reasons = ["No such file", "cannot be read as", "climbs", "URL", "empty"]
    for bad, reason in zip(data.skipped, reasons, strict=True):
        assert reason in bad.reason
    with pytest.raises(DatasetError) as error:
        load_instructions(path, max_bad=0.24)
    for part in (str(path), "record 15", "'bad0'", "'image'", "No such file", "5 of 20", "--max-bad"):
        assert part in str(error.value)


def test_only_images_of_selected_records_are_checked(root: Path) -> None:
    path = write_data(root, [record("a"), record("b", "gqa/none.png")])
    assert [item.id for item in load_instructions(path, sources=("coco",), max_bad=0)] == ["a"]
    with pytest.raises(DatasetError, match="No such file"):
        load_instructions(path, sources=("gqa",))


# Faults of structure.

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["not JSON"]),
        ("[{]", ["not JSON"]),
        ('[{"id": NaN}]', ["NaN is not JSON"]),
        ('[{"id": "a", "extra": -Infinity, "conversations": []}]', ["-Infinity is not JSON"]),
        (DEEP, ["nested too deeply"]),
        ("[" + "9" * 5000 + "]", ["not JSON"]),
        ({"a": 1}, ["an object instead of a list", ".jsonl"]),
        (None, ["nothing instead of a list"]),
        ([1], ["record 0", "a number"]),
        ([record(), []], ["record 1", "a list"]),
        ([record(id=[1])], ["record 0", "'id'"]),
        ([record(id=True)], ["'id'", "true or false"]),
        ([record(id=1.5)], ["'id'"]),
        ([record(id="\ud800")], ["'id'", "surrogate"]),
        ([record(image=3)], ["id 'a'", "'image'"]),
        ([record(image=["coco/1.png", None])], ["'image'"]),
        ([record(image={"path": "coco/1.png"})], ["'image'"]),
        ([{"id": "a"}], ["id 'a'", "'conversations'", "nothing"]),
        ([{"id": "a", "conversations": "Hi"}], ["'conversations'", "text"]),
        ([record("a", None, "Hi")], ["'conversations[0]'"]),
        ([record("a", None, human("Hi"), {"from": "bot", "value": "x"})], ["conversations[1].from", "'bot'"]),
        ([record("a", None, {"value": "x"})], ["conversations[0].from", "nothing"]),
        ([record("a", None, {"from": ["human"], "value": "x"})], ["conversations[0].from", "a list"]),
        ([record("a", None, human(3))], ["conversations[0].value", "a number"]),
        ([record("a", None, human("Hi"), {"from": "gpt"})], ["conversations[1].value", "nothing"]),
        ([record("a", None, human("\udfff"), gpt("x"))], ["conversations[0].value", "surrogate"]),
        ([], ["no record remains"]),
    ],
)
def test_faults_of_structure_name_file_record_and_field(root: Path, content: Any, parts: list[str]) -> None:
    path = write_data(root, content)
    with pytest.raises(DatasetError) as error:
        load_instructions(path)
    for part in [str(path), *parts]:
        assert part in str(error.value)


def test_unreadable_files_and_roots_are_dataset_errors(root: Path) -> None:
    (root / "latin.json").write_bytes(b'[{"id": "\xe9"}]')
    for path, image_root, reason in (
        (root / "none.json", None, "cannot be read"),
        (root / "coco", None, "cannot be read"),
        ("a\0b", root, "cannot be read"),
        (root / "latin.json", None, "not UTF-8 at byte 9"),
        (write_data(root, [record()]), root / "none", "not a folder.*--image-root"),
    ):
        with pytest.raises(DatasetError, match=reason):
            load_instructions(path, image_root)
