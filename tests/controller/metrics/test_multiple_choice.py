"""Rules of ScienceQA, AI2D, MMBench and MMMU on cases worked by hand, and readers of their files."""

import json
import random

import pyarrow
import pytest
from picture_files import image_base64, image_bytes, save_image
from pyarrow import parquet

from deepinsert.controller.metrics.benchmark import benchmark, check_images, question_rows
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
        ("The answer is A or The answer is B.", "B"),  # the pattern with a point comes first
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
        ("124", ["24"], False),  # numbers must be equal; as text it would contain "24"
        ("apple", ["a"], False),  # a single letter must be a word
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
    assert key_phrases("x = 1\ny = 2") == ["2"]  # "=" counts only in the last line


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
    """The reader returns only questions of the test split that have an image."""
    examples = benchmark("scienceqa").read(write_scienceqa(tmp_path), None)
    check_images(examples)
    assert [e.prompt.id for e in examples] == ["4", "6"]
    assert examples[0].prompt.question == (
        "Context: Look closely.\nWhich is it?\nA. cat\nB. dog\n"
        "Answer with the option's letter from the given choices directly."
    )
    score = benchmark("scienceqa").score(["B", "B"], examples)
    assert score.headline == 50 and score.details == {"natural science": 100, "social science": 0}


def test_scienceqa_in_llavas_wording(tmp_path):
    write_scienceqa(tmp_path)
    turns = [{"from": "human", "value": "<image>\nWhich?\nA. cat\nB. dog"}, {"from": "gpt", "value": "B"}]
    rows = [{"id": "4", "image": "4/image.png", "conversations": turns}, {"id": "5", "conversations": turns}]
    path = tmp_path / "llava_test_CQM-A.json"
    path.write_text(json.dumps(rows))
    (example,) = benchmark("scienceqa").read(path, None)
    assert example.references == ("B",) and example.prompt.question.startswith("Which?\nA. cat")
    check_images([example])


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
    assert question_rows(examples).tolist() == [0, 3]
    # The first question is right each time, the second only as published.
    score = benchmark("mmbench").score(["B", "A", "C", "A", "A"], examples)
    assert score.headline == 50 and score.items.tolist() == [1, 1, 1, 0, 0]
    assert score.details == {"vanilla": 100, "nature": 100, "place": 0}


def test_mmbench_uses_the_rotations_in_the_file(tmp_path):
    """In VLMEvalKit's file, further rows name the row that has the image."""
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
        ({"image": "@@@"}, r"field 'image': the text is no base64 image"),
        ({"image": "12"}, r"no row has the image of index 12"),
        ({"B": ""}, r"field 'B': the question has fewer than two options"),
        ({"index": "x"}, r"field 'index': a whole number"),
    ],
)
def test_errors_of_mmbench_name_row_and_field(tmp_path, change, problem):
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
    question = {
        "answerTexts": ["leaf", "root"],
        "correctAnswer": 1,
        "questionId": "12.png-0",
        "abcLabel": False,
    }
    record = {"imageName": "12.png", "questions": {"What is below?": question}}
    (tmp_path / "questions" / "12.png.json").write_text(json.dumps(record))
    (tmp_path / "questions" / "13.png.json").write_text(json.dumps({**record, "imageName": "13.png"}))
    save_image(tmp_path / "images" / "12.png")
    with pytest.raises(DatasetError, match=r"there is no ai2d_test_ids\.csv"):
        benchmark("ai2d").read(tmp_path, None)
    (tmp_path / "ai2d_test_ids.csv").write_text("12\n")
    (example,) = benchmark("ai2d").read(tmp_path, None)
    check_images([example])
    assert example.prompt.id == "12.png-0" and benchmark("ai2d").score(["b."], [example]).headline == 100


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
    score = benchmark("mmmu").score(["(B)", "It is two.", "B"], examples)
    assert score.items.tolist() == [1, 1, 0] and score.details["guessed"] == 0


def test_mmmu_repeats_its_guesses(tmp_path):
    rows = [mmmu_row(number) for number in range(200)]
    path = write_parquet(tmp_path / "validation-00000-of-00001.parquet", rows)
    examples = benchmark("mmmu").read(path, None)
    score = benchmark("mmmu").score(["?"] * 200, examples)
    assert score.details["guessed"] == 100 and 35 < score.headline < 65  # two options
    assert score.items.tolist() == benchmark("mmmu").score(["?"] * 200, examples).items.tolist()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"answer": "?"}, "'\\?' is no option"),
        ({"options": "['a', "}, "field 'options': a list in brackets"),
        ({"question": "<image 3> what?"}, "field 'image_3': the question names this image"),
    ],
)
def test_errors_of_mmmu_name_row_and_field(tmp_path, change, problem):
    path = write_parquet(tmp_path / "validation-0.parquet", [mmmu_row(1, **change)])
    with pytest.raises(DatasetError, match=f"row 0.*{problem}"):
        benchmark("mmmu").read(path, None)


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    path = tmp_path / "validation-0.parquet"
    path.write_bytes(b"no")
    with pytest.raises(DatasetError, match="the file is not a whole Parquet file"):
        benchmark("mmmu").read(path, None)
    with pytest.raises(DatasetError, match=r"there is no validation-\*\.parquet in it"):
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
    """A file that is cut off or partly overwritten is read, or refused with `DatasetError`; both happen."""
    path = write(tmp_path)
    whole, rng = path.read_bytes(), random.Random(0)
    junk = [b"null", b"{}", b"-1", b"\t", b"\n", b'"', b"\xff", b"NaN", b"\\ud800", b"9" * 30]
    refused = 0
    for _ in range(120):
        at = rng.randrange(len(whole))
        replacement = rng.choice(
            [b"", bytes([rng.randrange(256)]) + whole[at + 1 :], rng.choice(junk) + whole[at + 5 :]]
        )
        path.write_bytes(whole[:at] + replacement)
        try:
            examples = benchmark(name).read(path, None)
            benchmark(name).score(["B"] * len(examples), examples)
        except DatasetError:
            refused += 1
    assert 0 < refused < 120
