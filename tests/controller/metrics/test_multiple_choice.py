"""ScienceQA, AI2D, MMBench and MMMU on cases worked by hand, and their files."""

import json
import random

import pyarrow
import pytest
from picture_files import image_base64, image_bytes, save_image
from pyarrow import parquet

from deepinsert.controller.metrics.benchmark import benchmark, check_images, questions
from deepinsert.controller.metrics.rules.multiple_choice import (
    ai2d_letter,
    mmbench_letter,
    mmmu_letter,
    scienceqa_letter,
)
from deepinsert.controller.metrics.rules.open_answers import key_phrases, open_answer_is_right
from deepinsert.envs.data.media import DatasetError

OPTIONS = {"A": "a red ball", "B": "dog", "C": "house"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" B ", "B"),
        ("B\n", "B"),
        ("B. dog", "B"),
        ("B\nbecause", "B"),
        ("The answer is C.", "C"),
        ("I think The answer is C since A", "C"),
        ("The answer is A or The answer is B.", "B"),  # the one with a point is looked for first
        ("b", ""),
        ("dog", ""),
        ("(B)", ""),
        ("B.", ""),
    ],
)
def test_scienceqa_letter(answer, letter):
    assert scienceqa_letter(answer) == letter


@pytest.mark.parametrize(
    ("answer", "letter"), [("B", "B"), ("b", "B"), ("B.", "B"), ("(b)", "B"), ("B. dog", "B"), ("dog", "DOG")]
)
def test_ai2d_letter(answer, letter):
    assert ai2d_letter(answer) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B).", "B"),
        ("The answer is B: dog", "B"),
        ("A or B", ""),
        ("A or B dog", "B"),  # letters disagree, the text decides
        ("it is a dog", "B"),
        ("a dog in a house", ""),
        ("D", ""),
        ("dog " * 20, ""),  # too long to be one option's text
    ],
)
def test_mmbench_letter(answer, letter):
    assert mmbench_letter(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(A) or rather (B)", "B"),
        ("A, no: B", "B"),
        ("(A) though B", "A"),  # brackets win over bare letters
        ("I would say that it is the dog", "B"),
        ("the dog", ""),  # too short for the text of options to count
        ("b", ""),
    ],
)
def test_mmmu_letter(answer, letter):
    assert mmmu_letter(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answer", "references", "right"),
    [
        ("24", ["24"], True),
        ("The answer is 24.0", ["24"], True),
        ("It is 1,234 dollars", ["1234"], True),
        ("3.14159", ["3.14"], True),  # two decimals
        ("x = 7", ["7"], True),
        ("So the result is the mitral valve", ["Mitral Valve"], True),
        ("aorta", ["vein"], False),
        ("25", ["24"], False),
        ("124", ["24"], False),  # numbers are equal or not; text would hold "24"
        ("apple", ["a"], False),  # one letter must stand apart
        ("class a", ["a"], True),
        ("2.5e3", ["2500"], True),
        ("yes", ["yes", "true"], True),
        ("The first is 5\nthe last is 6", ["5"], True),
    ],
)
def test_mmmu_open_answers(answer, references, right):
    assert open_answer_is_right(answer, references) is right


def test_key_phrases():
    assert key_phrases("It is so that the answer is 5.\nFinal: x = 3") == ["5.", "3"]
    assert key_phrases("blue.") == ["blue"]
    assert key_phrases("x = 1\ny = 2") == ["2"]  # "=" counts in the last line alone


def write_scienceqa(folder):
    problem = {
        "question": "Which is it?",
        "choices": ["cat", "dog"],
        "answer": 1,
        "hint": "Look closely.",
        "image": "image.png",
        "subject": "natural science",
    }
    problems = {
        "4": problem,
        "5": {**problem, "image": None},
        "6": {**problem, "answer": 0, "hint": "", "subject": "social science"},
        "7": problem,
    }
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": ["7"], "test": ["4", "5", "6"]}))
    for name in ("4", "6"):
        save_image(folder / "images" / "test" / name / "image.png")
    return folder / "problems.json"


def test_scienceqa(tmp_path):
    """Only the test split's questions with an image."""
    examples = benchmark("scienceqa").read(write_scienceqa(tmp_path), None)
    check_images(examples)
    assert [e.prompt.id for e in examples] == ["4", "6"]
    assert examples[0].prompt.question == (
        "Context: Look closely.\nWhich is it?\nA. cat\nB. dog\n"
        "Answer with the option's letter from the given choices directly."
    )
    found = benchmark("scienceqa").score(["B", "B"], examples)
    assert found.headline == 50 and found.details == {"natural science": 100, "social science": 0}


def test_scienceqa_as_llava_asks(tmp_path):
    write_scienceqa(tmp_path)
    said = [{"from": "human", "value": "<image>\nWhich?\nA. cat\nB. dog"}, {"from": "gpt", "value": "B"}]
    rows = [{"id": "4", "image": "4/image.png", "conversations": said}, {"id": "5", "conversations": said}]
    path = tmp_path / "llava_test_CQM-A.json"
    path.write_text(json.dumps(rows))
    (found,) = benchmark("scienceqa").read(path, None)
    assert found.references == ("B",) and found.prompt.question.startswith("Which?\nA. cat")
    check_images([found])


def write_mmbench(folder, rows):
    path = folder / "mmbench_dev.tsv"
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    lines = ["\t".join(columns)] + ["\t".join(str(row.get(name, "")) for name in columns) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_mmbench_makes_every_rotation(tmp_path):
    image = image_base64()
    rows = [
        {"index": 7, "question": "Which?", "hint": "Look.", "A": "cat", "B": "dog", "C": "hen", "answer": "B",
         "category": "nature", "image": image},
        {"index": 9, "question": "Where?", "A": "left", "B": "right", "answer": "A", "category": "place",
         "image": image},
    ]  # fmt: skip
    examples = benchmark("mmbench").read(write_mmbench(tmp_path, rows), None)
    check_images(examples)
    assert [e.prompt.id for e in examples] == ["7", "1000007", "2000007", "9", "1000009"]
    # dog is B, then A (dog hen cat), then C (hen cat dog)
    assert [e.references[0] for e in examples] == ["B", "A", "C", "A", "B"]
    assert examples[1].prompt.question.startswith("Look.\nWhich?\nA. dog\nB. hen\nC. cat\nAnswer with")
    assert examples[1].prompt.load_images()[0].size == (8, 6)
    assert questions(examples).tolist() == [0, 3]
    # The first question is right each time, the second only as published.
    found = benchmark("mmbench").score(["B", "A", "C", "A", "A"], examples)
    assert found.headline == 50 and found.items.tolist() == [1, 1, 1, 0, 0]
    assert found.details == {"vanilla": 100, "nature": 100, "place": 0}


def test_mmbench_takes_rotations_that_the_file_has(tmp_path):
    """VLMEvalKit's file: further rows name the row that has the image."""
    row = {"index": 7, "question": "Which?", "A": "cat", "B": "dog", "answer": "B", "image": image_base64()}
    turned = {**row, "index": 1000007, "A": "dog", "B": "cat", "answer": "A", "image": 7}
    examples = benchmark("mmbench").read(write_mmbench(tmp_path, [row, turned]), None)
    assert len(examples) == 2 and examples[1].prompt.load_images()[0].size == (8, 6)
    assert benchmark("mmbench").score(["B", "dog"], examples).headline == 100
    assert benchmark("mmbench").score(["B", "B"], examples).headline == 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"answer": ""}, r"line 2, field 'answer': '' is no option; the test split"),
        ({"image": "@@@"}, r"field 'image': no base64 image"),
        ({"image": "12"}, r"no row has the image of index 12"),
        ({"B": ""}, r"field 'B': fewer than two options"),
        ({"index": "x"}, r"field 'index': a whole number"),
    ],
)
def test_mmbench_names_what_is_wrong(tmp_path, change, problem):
    row = {"index": 7, "question": "Which?", "A": "cat", "B": "dog", "answer": "B", "image": image_base64()}
    with pytest.raises(DatasetError, match=problem):
        benchmark("mmbench").read(write_mmbench(tmp_path, [{**row, **change}]), None)


def test_a_broken_base64_image_is_named(tmp_path):
    row = {"index": 7, "question": "?", "A": "cat", "B": "dog", "answer": "B", "image": "AAAA"}
    with pytest.raises(DatasetError, match=r"mmbench_dev.tsv, line 2, field 'image'.*cannot be read as JPEG"):
        check_images(benchmark("mmbench").read(write_mmbench(tmp_path, [row]), None))


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_ai2d_as_published(tmp_path):
    (tmp_path / "questions").mkdir()
    asked = {"answerTexts": ["leaf", "root"], "correctAnswer": 1, "questionId": "12.png-0", "abcLabel": False}
    record = {"imageName": "12.png", "questions": {"What is below?": asked}}
    (tmp_path / "questions" / "12.png.json").write_text(json.dumps(record))
    (tmp_path / "questions" / "13.png.json").write_text(json.dumps({**record, "imageName": "13.png"}))
    save_image(tmp_path / "images" / "12.png")
    with pytest.raises(DatasetError, match=r"no ai2d_test_ids\.csv"):
        benchmark("ai2d").read(tmp_path, None)
    (tmp_path / "ai2d_test_ids.csv").write_text("12\n")
    (found,) = benchmark("ai2d").read(tmp_path, None)
    check_images([found])
    assert found.prompt.id == "12.png-0" and benchmark("ai2d").score(["b."], [found]).headline == 100


def test_ai2d_as_a_table(tmp_path):
    row = {
        "question": "What?",
        "options": ["x", "y", "z"],
        "answer": "2",
        "image": {"bytes": image_bytes(), "path": "1.png"},
    }
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [row, row])
    examples = benchmark("ai2d").read(tmp_path, None)
    check_images(examples)
    assert len({e.prompt.id for e in examples}) == 2
    assert benchmark("ai2d").score(["C", "A"], examples).headline == 50


def mmmu_row(number, **values):
    images = {f"image_{n}": None for n in range(1, 8)}
    return {
        "id": f"validation_Art_Theory_{number}",
        "question": "<image 1> Who made <image 2>?",
        "options": "['Van Gogh', \"O'Keeffe\"]",
        "answer": "B",
        "question_type": "multiple-choice",
        **images,
        "image_1": {"bytes": image_bytes((8, 6)), "path": "1.png"},
        "image_2": {"bytes": image_bytes((5, 5)), "path": "2.png"},
        **values,
    }


def test_mmmu(tmp_path):
    rows = [
        mmmu_row(1),
        mmmu_row(2, question="How many?", options="[]", answer="['2', 'two']", question_type="open"),
        mmmu_row(3, answer="A"),
    ]
    write_parquet(tmp_path / "Art_Theory" / "validation-00000-of-00001.parquet", rows)
    examples = benchmark("mmmu").read(tmp_path, None)
    check_images(examples)
    first = examples[0].prompt
    kinds = [part["type"] for part in first.messages[0]["content"]]
    assert kinds == ["image", "text", "image", "text"] and first.source == "Art_Theory"
    assert [image.size for image in first.load_images()] == [(8, 6), (5, 5)]
    assert "(B) O'Keeffe\n\nAnswer with" in first.messages[0]["content"][3]["text"]
    # Images without a mark come first.
    assert [part["type"] for part in examples[1].prompt.messages[0]["content"]] == ["image", "image", "text"]
    found = benchmark("mmmu").score(["(B)", "It is two.", "B"], examples)
    assert found.items.tolist() == [1, 1, 0] and found.details["guessed"] == 0


def test_mmmu_guesses_alike_each_time(tmp_path):
    rows = [mmmu_row(number) for number in range(200)]
    path = write_parquet(tmp_path / "validation-00000-of-00001.parquet", rows)
    examples = benchmark("mmmu").read(path, None)
    found = benchmark("mmmu").score(["?"] * 200, examples)
    assert found.details["guessed"] == 100 and 35 < found.headline < 65  # two options
    assert found.items.tolist() == benchmark("mmmu").score(["?"] * 200, examples).items.tolist()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"answer": "?"}, "'\\?' is no option"),
        ({"options": "['a', "}, "field 'options': a list in brackets"),
        ({"question": "<image 3> what?"}, "field 'image_3': the question names it"),
    ],
)
def test_mmmu_names_what_is_wrong(tmp_path, change, problem):
    path = write_parquet(tmp_path / "validation-0.parquet", [mmmu_row(1, **change)])
    with pytest.raises(DatasetError, match=f"row 0.*{problem}"):
        benchmark("mmmu").read(path, None)


def test_what_is_no_parquet_is_named(tmp_path):
    path = tmp_path / "validation-0.parquet"
    path.write_bytes(b"no")
    with pytest.raises(DatasetError, match="not a whole Parquet file"):
        benchmark("mmmu").read(path, None)
    with pytest.raises(DatasetError, match=r"no validation-\*\.parquet in it"):
        benchmark("mmmu").read(tmp_path / "none", None)


def write_rotated(folder):
    row = {"index": 7, "question": "Which?", "A": "cat", "B": "dog", "answer": "B", "image": image_base64()}
    return write_mmbench(folder, [row, {**row, "index": 9, "image": 7}])


def write_subject(folder):
    return write_parquet(folder / "validation-0.parquet", [mmmu_row(1), mmmu_row(2)])


@pytest.mark.parametrize(
    ("name", "write"), [("scienceqa", write_scienceqa), ("mmbench", write_rotated), ("mmmu", write_subject)]
)
def test_a_damaged_file_is_read_or_refused(tmp_path, name, write):
    """Cut off, a byte changed, or something else written over a few: never another error, and both happen."""
    path = write(tmp_path)
    whole, rng = path.read_bytes(), random.Random(0)
    junk = [b"null", b"{}", b"-1", b"\t", b"\n", b'"', b"\xff", b"NaN", b"\\ud800", b"9" * 30]
    refused = 0
    for _ in range(120):
        at = rng.randrange(len(whole))
        kept = rng.choice(
            [b"", bytes([rng.randrange(256)]) + whole[at + 1 :], rng.choice(junk) + whole[at + 5 :]]
        )
        path.write_bytes(whole[:at] + kept)
        try:
            examples = benchmark(name).read(path, None)
            benchmark(name).score(["B"] * len(examples), examples)
        except DatasetError:
            refused += 1
    assert 0 < refused < 120
