"""Instruction files: what LLaVA publishes loads as it is; anything else is a `DatasetError`."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from deepinsert.envs.data.instructions import InstructionData, Record, Turn, load_instructions, split_by_image
from deepinsert.envs.data.media import DatasetError

EASY_VQA = Path(__file__).parents[3] / "shared" / "data" / "easy_vqa" / "train.json"


def human(value: Any) -> dict[str, Any]:
    return {"from": "human", "value": value}


def gpt(value: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": value}


def record(id: Any = "a", image: Any = "coco/1.png", *turns: dict[str, Any]) -> dict[str, Any]:
    made = {"id": id, "conversations": list(turns or (human("<image>\nWhat?"), gpt("A cat.")))}
    return made if image is None else {**made, "image": image}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    inside = tmp_path / "root"
    for name in ("coco/1.png", "coco/2.png", "coco/train2017/3.png", "gqa/1.png", "4.png"):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), "red").save(inside / name)
    return inside


def written(root: Path, content: Any, name: str = "data.json") -> Path:
    path = root / name
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


# What LLaVA's mix holds.


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
    data = load_instructions(written(root, items))
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


def test_turns_that_do_not_pair_up_are_mended_or_skipped_and_counted(root: Path) -> None:
    items = [
        record("leading", None, gpt("Welcome"), human("Hi"), gpt("Hello")),
        record("trailing", None, human("Hi"), gpt("Hello"), human("Bye")),
        record("unmarked", "coco/1.png", human("What?"), gpt("A cat")),
        record("twice", None, human("Hi"), human("Hi?"), gpt("Hello")),
        record("alone", None, human("Hi")),
        {"id": "empty", "conversations": []},
        record("marks", "coco/1.png", human("<image><image>"), gpt("A cat")),
    ]
    data = load_instructions(written(root, items), max_bad=0.6)
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
        ("empty", 5, "conversations"),
        ("marks", 6, "image"),
    ]
    assert data.skipped[3].reason == "2 <image> marks for 1 images"


def test_json_lines_load_too(root: Path) -> None:
    lines = "\n".join(json.dumps(record(str(number), None)) for number in range(3)) + "\n\n"
    data = load_instructions(written(root, lines, "data.jsonl"))
    assert [item.id for item in data] == ["0", "1", "2"]
    with pytest.raises(DatasetError, match=r"data\.jsonl, line 2: not JSON"):
        load_instructions(written(root, lines.split("\n")[0] + "\n{", "data.jsonl"))


def test_a_byte_order_mark_is_no_obstacle(root: Path) -> None:
    assert len(load_instructions(written(root, "\ufeff" + json.dumps([record()])))) == 1


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
    path = written(root, items)
    data = load_instructions(path, max_bad=0.25)
    assert len(data) == 15
    assert [(bad.id, bad.index, bad.field) for bad in data.skipped] == [
        (f"bad{number}", 15 + number, "image") for number in range(5)
    ]
    for bad, reason in zip(
        data.skipped, ["No such file", "cannot be read as", "climbs", "URL", "empty"], strict=True
    ):
        assert reason in bad.reason
    with pytest.raises(DatasetError) as error:
        load_instructions(path, max_bad=0.24)
    for part in (str(path), "record 15", "'bad0'", "'image'", "No such file", "5 of 20", "--max-bad"):
        assert part in str(error.value)


def test_only_images_of_kept_records_are_looked_at(root: Path) -> None:
    path = written(root, [record("a"), record("b", "gqa/none.png")])
    assert [item.id for item in load_instructions(path, sources=("coco",), max_bad=0)] == ["a"]
    with pytest.raises(DatasetError, match="No such file"):
        load_instructions(path, sources=("gqa",))


# Choosing records.


def test_sources_go_by_path_prefix(root: Path) -> None:
    images = ["coco/1.png", "./coco/train2017/3.png", "gqa/1.png", "4.png", None]
    turns = (human("Hi"), gpt("Hello"))
    path = written(root, [record(str(number), image, *turns) for number, image in enumerate(images)])

    def kept(*sources: str) -> str:
        return "".join(item.id for item in load_instructions(path, sources=sources))

    assert kept("coco") == "01"
    assert kept("coco/train2017") == "1"
    assert kept("text", "gqa") == "24"
    assert kept(".") == "3"
    with pytest.raises(DatasetError, match=r"'coc'; the sources are: coco \(2\), .*text \(1\)"):
        kept("coco", "coc")


def test_fraction_is_seeded_nested_and_blind_to_order(root: Path) -> None:
    items = [record(f"{number}", None, human(f"{number}?"), gpt("Yes")) for number in range(200)]

    def kept(content: list[Any], fraction: float, seed: int = 0) -> set[str]:
        data = load_instructions(written(root, content), fraction=fraction, seed=seed)
        assert [item.index for item in data] == sorted(item.index for item in data)
        return {item.id for item in data}

    tenth = kept(items, 0.1)
    assert len(tenth) == 20 and tenth == kept(items, 0.1)
    assert tenth == kept(items[::-1], 0.1)
    assert tenth < kept(items, 0.2)
    assert tenth != kept(items, 0.1, seed=1)
    assert len(kept(items, 1e-9)) == 1
    for fraction in (0, -1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="fraction"):
            kept(items, fraction)


def test_fraction_after_sources_does_not_depend_on_other_sources(root: Path) -> None:
    coco = [record(f"c{number}") for number in range(40)]
    text = [record(f"t{number}", None) for number in range(40)]
    alone = load_instructions(written(root, coco), sources=("coco",), fraction=0.25)
    mixed = load_instructions(written(root, text + coco), sources=("coco",), fraction=0.25)
    assert len(alone) == 10 and {item.id for item in alone} == {item.id for item in mixed}


def test_fraction_keeps_all_that_is_asked_about_an_image(root: Path) -> None:
    items = [
        record(f"{image}-{turn}", f"coco/{image}.jpg", human(f"<image>\n{turn}?"), gpt("Yes"))
        for turn in range(5)
        for image in range(40)
    ]
    for image in range(40):
        Image.new("RGB", (8, 8)).save(root / f"coco/{image}.jpg")
    kept = load_instructions(written(root, items), fraction=0.25)
    counts = Counter(item.image_key for item in kept)
    assert len(kept) == 50 and set(counts.values()) == {5}
    more = load_instructions(written(root, items), fraction=0.26)
    assert sorted(Counter(item.image_key for item in more).values()) == [2, *[5] * 10]
    assert {item.id for item in kept} < {item.id for item in more}


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
        ([record("a", None, "Hi")], ["'conversations[0]'"]),  # type: ignore[arg-type]
        ([record("a", None, human("Hi"), {"from": "bot", "value": "x"})], ["conversations[1].from", "'bot'"]),
        ([record("a", None, {"value": "x"})], ["conversations[0].from", "nothing"]),
        ([record("a", None, {"from": ["human"], "value": "x"})], ["conversations[0].from", "a list"]),
        ([record("a", None, human(3))], ["conversations[0].value", "a number"]),
        ([record("a", None, human("Hi"), {"from": "gpt"})], ["conversations[1].value", "nothing"]),
        ([record("a", None, human("\udfff"), gpt("x"))], ["conversations[0].value", "surrogate"]),
        ([], ["no record is left"]),
    ],
)
def test_faults_of_structure_name_file_record_and_field(root: Path, content: Any, parts: list[str]) -> None:
    path = written(root, content)
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
        (written(root, [record()]), root / "none", "not a folder.*--image-root"),
    ):
        with pytest.raises(DatasetError, match=reason):
            load_instructions(path, image_root)


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


def test_a_split_is_seeded_and_blind_to_order() -> None:
    items = items_of(*[(f"coco/{number // 3}",) for number in range(60)])

    def held(seed: int, order: int = 1) -> set[str]:
        return {item.id for item in split_by_image(items[::order], seed=seed)[1]}

    assert len(held(0)) == 15 and held(0) == held(0) == held(0, order=-1)
    assert held(0) != held(1)


def test_both_sides_hold_something_where_possible() -> None:
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


# Whatever a file holds.

_opened: list[tuple[Any, int]] | None = None


def _note_opening(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append((arguments[0], arguments[2]))


sys.addaudithook(_note_opening)  # Cannot be taken out again; outside `opened_files` it does nothing.


@contextmanager
def opened_files() -> Iterator[list[tuple[Any, int]]]:
    """Collects (path, flags) of everything the interpreter opens meanwhile."""
    global _opened
    _opened = collected = []
    try:
        yield collected
    finally:
        _opened = None


def is_within(path: Any, flags: int, root: Path, data: Path) -> bool:
    """Whether an opened path is the data file, the root, or one component opened without following links.

    Components are opened relative to the folder before them, the first relative to the root, so that a plain
    name without following links cannot leave it.
    """
    if isinstance(path, int):
        return True  # A descriptor that was opened, and judged, before.
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
    inside = outside / "root"
    for name in ("coco/1.png", "coco/2.png", "gqa/1.png"):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(inside / name)
    Image.new("RGB", (2, 2)).save(outside / "secret.png")
    os.mkfifo(inside / "fifo")
    (inside / "link.png").symlink_to("../secret.png")
    (inside / "up").symlink_to("..")
    (inside / "absolute.png").symlink_to(outside / "secret.png")
    (inside / "loop").symlink_to("loop")
    (inside / "broken.png").write_bytes(b"broken")
    # What Python and Pillow import on first use is not what is watched below.
    load_instructions(written(outside, [record(), record("b", "broken.png")]), inside, max_bad=1)
    return inside


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=FILES, max_bad=st.sampled_from([0.0, 0.5, 1.0]), jsonl=st.booleans())
def test_any_file_gives_data_or_a_dataset_error_and_opens_nothing_outside(
    trap: Path, content: str, max_bad: float, jsonl: bool
) -> None:
    path = trap.parent / ("data.jsonl" if jsonl else "data.json")
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with opened_files() as opened:
        try:
            data = load_instructions(path, trap, max_bad=max_bad)
        except DatasetError as error:
            data = None
            assert str(path) in str(error)
    assert opened[0][0] == str(path)
    assert [entry for entry in opened if not is_within(*entry, trap, path)] == []
    if data is not None:
        assert len(data) >= 1
        for item in data:
            assert item.turns and item.source
            for image in item.images:
                assert image in ("coco/1.png", "coco/2.png", "gqa/1.png")
            for turn in item.turns:
                (turn.question + turn.answer + item.id).encode()
        assert len(data.skipped) <= max_bad * (len(data) + len(data.skipped))


def test_the_audit_would_see_a_file_opened_outside(trap: Path) -> None:
    with opened_files() as opened:
        (trap / "link.png").read_bytes()
    assert not is_within(*opened[0], trap, trap.parent / "data.json")
