"""Rules of POPE, MME and GQA on cases worked by hand, and readers of their files."""

import json

import pytest
from picture_files import save_image

from deepinsert.controller.metrics.benchmark import benchmark, check_images
from deepinsert.controller.metrics.contract import Example
from deepinsert.controller.metrics.rules.yes_no_accuracy import mme_answer, says_no
from deepinsert.envs.data.media import DatasetError
from deepinsert.envs.prompts import Prompt


@pytest.mark.parametrize(
    ("answer", "no"),
    [
        ("No", True),
        ("no, there is none", True),
        ("There is not a dog.", True),
        ("Yes. There is no cat.", False),  # only the first sentence counts
        ("Nothing there", False),  # "No" must be a whole word
        ("NO", False),  # the script knows three spellings
        ("It isn't", False),
        ("", False),
        ("No.", True),
    ],
)
def test_pope_reads_no_from_words_of_the_first_sentence(answer, no):
    assert says_no(answer) is no


def pope_example(category, label):
    return Example(Prompt("", category, "", [], (), label), (label,))


def test_pope_is_the_mean_of_three_f1():
    """The F1 of random is 2/3 (2 hits, 1 false alarm, 1 miss: precision 2/3, recall 2/3).

    In popular all answers are right (F1 1), and in adversarial none is yes (F1 0).
    """
    labels = {
        "random": ["yes", "yes", "yes", "no", "no"],
        "popular": ["yes", "no"],
        "adversarial": ["yes", "no"],
    }
    answers = ["Yes", "yes", "No", "Yes", "no", "yes", "no", "no", "no"]
    examples = [pope_example(category, label) for category in labels for label in labels[category]]
    score = benchmark("pope").score(answers, examples)
    assert score.headline == pytest.approx(100 * (2 / 3 + 1 + 0) / 3) and score.unit == "F1"
    assert score.items.tolist() == [1, 1, 0, 0, 1, 1, 1, 0, 1]
    assert score.details["random/precision"] == pytest.approx(100 * 2 / 3)
    assert score.details["random/accuracy"] == pytest.approx(60)
    assert score.details["random/yes-ratio"] == pytest.approx(60)
    assert score.details["adversarial/precision"] == 0


def write_pope(folder):
    for category in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": n, "image": "COCO_val2014_1.jpg", "text": f"Is there a {thing}?", "label": label}
            for n, (thing, label) in enumerate([("dog", "yes"), (category, "no")], 1)
        ]
        (folder / f"coco_pope_{category}.json").write_text("\n".join(map(json.dumps, rows)) + "\n")
    save_image(folder / "val2014" / "COCO_val2014_1.jpg")


def test_read_pope(tmp_path):
    write_pope(tmp_path)
    examples = benchmark("pope").read(tmp_path, None)
    check_images(examples)
    assert len({e.prompt.id for e in examples}) == 6 and examples[0].prompt.id == "random/1"
    assert examples[3].prompt.source == "popular" and examples[3].references == ("no",)
    alone = benchmark("pope").read(tmp_path / "coco_pope_popular.json", None)
    assert [e.prompt.id for e in alone] == ["popular/1", "popular/2"]
    (tmp_path / "coco_pope_random.json").unlink()
    with pytest.raises(DatasetError, match=r"there is no coco_pope_random\.json; POPE"):
        benchmark("pope").read(tmp_path, None)


def test_read_llava_pope(tmp_path):
    """LLaVA's file numbers all questions; each category's labels are in the order of its own file."""
    (tmp_path / "coco").mkdir()
    write_pope(tmp_path / "coco")
    questions = [("adversarial", "adversarial"), ("popular", "dog"), ("adversarial", "dog")]
    rows = [
        {
            "question_id": n,
            "image": "COCO_val2014_1.jpg",
            "text": f"Is there a {thing}?\nAnswer the question using a single word or phrase.",
            "category": category,
        }
        for n, (category, thing) in enumerate(questions)
    ]
    path = tmp_path / "llava_pope_test.jsonl"
    path.write_text("\n".join(json.dumps(rows[n]) for n in (1, 2)))
    examples = benchmark("pope").read(path, tmp_path / "coco" / "val2014")
    assert [(e.prompt.id, e.references[0]) for e in examples] == [("1", "yes"), ("2", "yes")]
    check_images(examples)
    path.write_text(json.dumps(rows[0]))
    with pytest.raises(DatasetError, match=r"it is not the question of .*adversarial\.json, line 1"):
        benchmark("pope").read(path, None)


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes.", "yes"),
        ("no", "no"),
        ("Y", "yes"),
        ("n", "no"),
        ("a", "other"),
        ("Yes, it is", "yes"),
        ("not sure", "no"),  # "no" is within the first four characters
        ("I say yes", "other"),
        ("", "other"),
    ],
)
def test_mme_reads_the_first_four_characters(answer, read):
    assert mme_answer(answer) == read


def write_mme(folder):
    for category, inner in (("color", False), ("artwork", True), ("code_reasoning", False)):
        base = folder / category
        texts = base / "questions_answers_YN" if inner else base
        texts.mkdir(parents=True)
        for name in ("a", "b"):
            lines = [
                f"Is it {name}? Please answer yes or no.\tYes",
                f"Is it c{name}? Please answer yes or no.\tNo",
            ]
            (texts / f"{name}.txt").write_text("\n".join(lines) + "\n")
            save_image((base / "images" if inner else base) / f"{name}.png")


def test_mme_adds_accuracy_and_accuracy_plus(tmp_path):
    """In color, 3 of 4 answers and 1 of 2 images are right (75 + 50); all in artwork (200), none in code."""
    write_mme(tmp_path)
    examples = benchmark("mme").read(tmp_path, None)
    check_images(examples)
    assert [e.prompt.id for e in examples[:2]] == ["artwork/a.png#1", "artwork/a.png#2"]
    assert examples[0].prompt.question == "Is it a?\nAnswer the question using a single word or phrase."
    answers = [e.references[0].title() for e in examples]
    for index, example in enumerate(examples):
        if example.prompt.id == "color/b.png#2":
            answers[index] = "Yes"
        if example.prompt.source == "code_reasoning":
            answers[index] = "maybe"
    score = benchmark("mme").score(answers, examples)
    assert score.details == {
        "artwork": 200,
        "code_reasoning": 0,
        "color": 125,
        "perception": 325,
        "cognition": 0,
    }
    assert score.headline == 325 and score.items.sum() == 7


def test_mme_names_the_line_that_it_cannot_read(tmp_path):
    write_mme(tmp_path)
    (tmp_path / "color" / "a.txt").write_text("Is it a?\tYes\n")
    with pytest.raises(DatasetError, match=r"a\.txt: the file has 1 questions; MME asks two"):
        benchmark("mme").read(tmp_path, None)
    (tmp_path / "color" / "a.txt").write_text("Is it a?\tYes\nIs it b? maybe\n")
    with pytest.raises(DatasetError, match=r"a\.txt, line 2: a question, a tab"):
        benchmark("mme").read(tmp_path, None)


def write_gqa(folder):
    questions = {
        "201": {
            "question": "Is it overcast?",
            "imageId": "n1",
            "answer": "no",
            "types": {"structural": "verify"},
        },
        "202": {
            "question": "Which color?",
            "imageId": "n1",
            "answer": "red",
            "types": {"structural": "query"},
        },
    }
    path = folder / "testdev_balanced_questions.json"
    path.write_text(json.dumps(questions))
    save_image(folder / "images" / "n1.jpg")
    return path


def test_gqa(tmp_path):
    path = write_gqa(tmp_path)
    examples = benchmark("gqa").read(path, None)
    check_images(examples)
    score = benchmark("gqa").score(["No.", "dark red"], examples)
    assert score.headline == 50 and score.details == {"verify": 100, "query": 0}


def test_llava_gqa_selects_and_words_the_questions(tmp_path):
    write_gqa(tmp_path)
    path = tmp_path / "llava_gqa_testdev_balanced.jsonl"
    path.write_text(json.dumps({"question_id": "202", "image": "n1.jpg", "text": "Which?\nShort."}) + "\n")
    (example,) = benchmark("gqa").read(path, None)
    assert (
        example.prompt.id == "202"
        and example.prompt.question == "Which?\nShort."
        and example.references == ("red",)
    )
    path.write_text(json.dumps({"question_id": "9", "image": "n1.jpg", "text": "Which?"}) + "\n")
    with pytest.raises(DatasetError, match=r"line 1, field 'question_id': .* no question '9'"):
        benchmark("gqa").read(path, None)
