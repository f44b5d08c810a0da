"""VQA accuracy on cases worked by hand, and readers of TextVQA, VQAv2 and OK-VQA."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from picture_files import save_image

from deepinsert.controller.metrics.benchmark import benchmark, check_images
from deepinsert.controller.metrics.contract import Example
from deepinsert.controller.metrics.rules.vqa_accuracy import agreement, textvqa_answer, vqa_answer
from deepinsert.envs.data.media import DatasetError
from deepinsert.envs.prompts import Prompt


def example(*references, **facts):
    return Example(Prompt.from_question("?"), references, facts)


@pytest.mark.parametrize(
    ("same", "score"),
    # Of ten people, `same` gave the answer. Each of these has same - 1 others, the other people have same.
    [
        (0, 0.0),
        (1, 9 / 10 * 1 / 3),
        (2, 2 / 10 * 1 / 3 + 8 / 10 * 2 / 3),
        (3, 3 / 10 * 2 / 3 + 7 / 10),
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_agreement_leaves_one_person_out(same, score):
    assert agreement("red", ["red"] * same + ["blue"] * (10 - same)) == pytest.approx(score)


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=10), st.sampled_from("abcd"))
def test_agreement_is_a_share(references, answer):
    assert 0 <= agreement(answer, references) <= 1


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (" The\tRed  Ball\n", "red ball"),
        ("Two", "2"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("shed", "shed"),
        ("left-hand", "left hand"),
        ("left - hand", "left hand"),
        ("1,000", "1000"),
        ("1,000-2", "10002"),  # with a comma between digits, every mark is removed
        ("3.5", "3.5"),
        ("St. John.", "st john"),
        ("yes, it is", "yes it is"),
        ("it's", "it's"),
        ("a", ""),
        ("10:30", "10:30"),
    ],
)
def test_vqa_answer(text, plain):
    assert vqa_answer(text) == plain


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Mc Donald's", "mc donald 's"),
        ("a,b", "ab"),
        ("What?", "what"),
        ("it's", "it 's"),
        ("Nokia.", "nokia"),
    ],
)
def test_textvqa_answer(text, plain):
    assert textvqa_answer(text) == plain


def test_textvqa_normalises_answer_and_references():
    score = benchmark("textvqa").score(["The STOP."], [example(*["stop"] * 8, "Stop.", "halt")])
    assert score.headline == 100 and score.items.tolist() == [1.0]


def test_vqav2_removes_articles_only_from_the_answer():
    """The script removes punctuation from references if people disagree, and keeps their words."""
    rule = benchmark("vqav2").score
    assert rule(["the dog"], [example(*["dog"] * 10)]).headline == 100
    assert rule(["the dog"], [example(*["the dog"] * 10)]).headline == 0
    assert rule(["red blue"], [example(*["red/blue"] * 9, "x")]).headline == 100
    assert rule(["red blue"], [example(*["red/blue"] * 10)]).headline == 0


def test_vqav2_reports_types_of_answers():
    examples = [example(*["yes"] * 10, answer_type="yes/no"), example(*["2"] * 10, answer_type="number")]
    assert benchmark("vqav2").score(["yes", "3"], examples).details == {"yes/no": 100, "number": 0}


@pytest.fixture
def textvqa(tmp_path):
    rows = [
        {
            "question_id": 34602 + n,
            "question": f"What is brand {n}?",
            "image_id": "003a8ae2ef43b901",
            "answers": ["nous les gosses"] * 7 + ["dakota"] * 3,
            "set_name": "val",
        }
        for n in range(2)
    ]
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"dataset_type": "val", "data": rows}))
    save_image(tmp_path / "train_images" / "003a8ae2ef43b901.jpg")
    return tmp_path


def test_read_textvqa(textvqa):
    examples = benchmark("textvqa").read(textvqa / "TextVQA_0.5.1_val.json", None)
    check_images(examples)
    first = examples[0]
    assert first.prompt.id == "34602" and first.prompt.answer == "nous les gosses"
    assert first.prompt.question == "What is brand 0?\nAnswer the question using a single word or phrase."
    assert first.prompt.load_images()[0].size == (8, 6)
    assert benchmark("textvqa").score(["dakota", "Nous les gosses"], examples).headline == pytest.approx(
        100 * ((3 / 10 * 2 / 3 + 7 / 10) + 1) / 2
    )


@pytest.mark.parametrize(
    "text",
    [
        "What is Brand 1?\nReference OCR token: A, B\nAnswer the question using a single word or phrase.",
        "Reference OCR token: A, B\nWhat is brand 1?\nAnswer the question using a single word or phrase.",
        "What is brand 1?\nAnswer the question using a single word or phrase.",
    ],
)
def test_read_llava_textvqa(textvqa, text):
    """LLaVA's question id is that of the image; the text of the question identifies the answers."""
    row = {"question_id": "003a8ae2ef43b901", "image": "003a8ae2ef43b901.jpg", "text": text}
    path = textvqa / "llava_textvqa_val_v051_ocr.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (example,) = benchmark("textvqa").read(path, None)
    assert example.prompt.id == "34603" and example.prompt.question == text
    assert example.prompt.load_images()


def write_coco(folder, prefix, answers):
    question = {"image_id": 42, "question": "What is it?", "question_id": 42000}
    truth = {
        "image_id": 42,
        "question_id": 42000,
        "question_type": "what is",
        "answer_type": "other",
        "answers": [{"answer": a, "answer_id": n} for n, a in enumerate(answers, 1)],
    }
    path = folder / f"{prefix}OpenEnded_mscoco_val2014_questions.json"
    path.write_text(json.dumps({"data_subtype": "val2014", "questions": [question]}))
    (folder / f"{prefix}mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": [truth]}))
    save_image(folder / "val2014" / "COCO_val2014_000000000042.jpg")
    return path


@pytest.mark.parametrize(("name", "prefix"), [("vqav2", "v2_"), ("okvqa", "")])
def test_read_vqa(tmp_path, name, prefix):
    path = write_coco(tmp_path, prefix, ["cat"] * 6 + ["dog"] * 4)
    examples = benchmark(name).read(path, None)
    check_images(examples)
    (example,) = examples
    assert example.prompt.id == "42000" and example.prompt.source == name and example.prompt.answer == "cat"
    assert benchmark(name).score(["Dog."], examples).headline == 100


def test_files_that_do_not_belong_are_named(tmp_path):
    path = write_coco(tmp_path, "v2_", ["cat"])
    (tmp_path / "v2_mscoco_val2014_annotations.json").rename(tmp_path / "away.json")
    with pytest.raises(DatasetError, match=r"put v2_mscoco_val2014_annotations.json there"):
        benchmark("vqav2").read(path, None)
    with pytest.raises(DatasetError, match="give the file of questions"):
        benchmark("vqav2").read(tmp_path / "away.json", None)
    bad = tmp_path / "TextVQA_0.5.1_val.json"
    bad.write_text('{"data": [{"question_id": 1, "question": "?", "image_id": "x"}]}')
    with pytest.raises(DatasetError, match=r"data\[0\], field 'answers': there is none; the test split"):
        benchmark("textvqa").read(bad, None)
    bad.write_text("[1, 2")
    with pytest.raises(DatasetError, match="the file is not JSON"):
        benchmark("textvqa").read(bad, None)
    with pytest.raises(DatasetError, match="No such file"):
        benchmark("textvqa").read(tmp_path / "none.json", None)


def test_a_missing_image_is_named_before_work_begins(textvqa):
    examples = benchmark("textvqa").read(textvqa / "TextVQA_0.5.1_val.json", None)
    (textvqa / "train_images" / "003a8ae2ef43b901.jpg").unlink()
    with pytest.raises(DatasetError, match=r"data\[0\].*No such file.*--image-root"):
        check_images(examples)


def test_an_image_cannot_lie_outside_its_root(textvqa):
    path = textvqa / "llava_textvqa_val_v051_ocr.jsonl"
    text = "What is brand 1?\nAnswer the question using a single word or phrase."
    path.write_text(json.dumps({"question_id": "003a8ae2ef43b901", "image": "../../x.jpg", "text": text}))
    with pytest.raises(DatasetError, match="climbs"):
        check_images(benchmark("textvqa").read(path, None))


def test_unknown_benchmark_lists_the_names():
    with pytest.raises(ValueError, match=r"'vqq'.*textvqa, vqav2"):
        benchmark("vqq")


def test_instructions_are_scored_by_exact_match(rendered_data):
    examples = benchmark("instructions").read(rendered_data, None)
    score = benchmark("instructions").score([e.prompt.answer.upper() for e in examples], examples)
    assert score.headline == 100 and len(score.items) == len(examples)
    assert set(score.details) == {e.prompt.source for e in examples}
