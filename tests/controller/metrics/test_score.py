"""`deepinsert score` matches answers with their questions and scores them."""

import json

import pytest
from picture_files import image_base64, save_image

from deepinsert.controller.metrics.benchmark import BENCHMARKS, benchmark
from deepinsert.controller.metrics.score import read_answers, run
from deepinsert.controller.options import ScoreOptions
from deepinsert.envs.data.media import DatasetError


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def examples_and_answers(rendered_data):
    examples = benchmark("instructions").read(rendered_data, None)
    return examples, [{"id": e.prompt.id, "prediction": e.prompt.answer} for e in examples]


def test_score(rendered_data, tmp_path, capsys):
    examples, rows = examples_and_answers(rendered_data)
    rows[0]["prediction"] = ""
    answers = write_rows(tmp_path / "answers.jsonl", reversed(rows))
    options = ScoreOptions(data=rendered_data, answers=answers, out=tmp_path / "out")
    result = run(options)
    share = 100 * (len(examples) - 1) / len(examples)
    assert result["headline"] == pytest.approx(share) and result["unit"] == "accuracy"
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    scores = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert [row["id"] for row in scores] == [e.prompt.id for e in examples]
    assert [row["score"] for row in scores] == [0.0] + [1.0] * (len(examples) - 1)
    assert f"accuracy {share:.2f}" in capsys.readouterr().out
    answers.unlink()
    answers.write_text("")  # a finished run is printed, not repeated
    assert run(options) == result


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda rows: rows[2:], r"there is no answer to 2 of \d+ questions \('"),
        (lambda rows: [*rows, rows[0]], "was already answered in .*line 1"),
        (lambda rows: [*rows, {"id": "?", "prediction": "x"}], "field 'id': the data has no question '\\?'"),
        (lambda rows: [{"prediction": "x"}], "field 'id': the answer does not name its question"),
        (lambda rows: [{"id": rows[0]["id"]}], "field 'prediction': the record has no answer"),
        (lambda rows: [{**rows[0], "prediction": None}], "field 'prediction': text is expected"),
        (
            lambda rows: [{**rows[0], "prediction": "\ud83d no"}],
            "line 1, field 'prediction': the text has broken Unicode",
        ),
        (
            lambda rows: [{"id": rows[0]["id"], "answer": "no", "pred": "yes"}],
            "field 'answer': it could be the answer, and 'pred' could be too",
        ),
        (lambda rows: ["x"], "a record with named fields is expected"),
        (lambda rows: [], "there is no record in it"),
    ],
)
def test_answers_that_do_not_fit_the_questions_are_refused(rendered_data, tmp_path, change, problem):
    examples, rows = examples_and_answers(rendered_data)
    path = write_rows(tmp_path / "answers.jsonl", change(rows))
    with pytest.raises(DatasetError, match=problem):
        read_answers(path, examples)


def test_llava_answers_to_one_image_are_distinguished_by_their_prompt(tmp_path):
    save_image(tmp_path / "color" / "a.jpg")
    lines = "Is it red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"
    (tmp_path / "color" / "a.txt").write_text(lines)
    examples = benchmark("mme").read(tmp_path, None)
    rows = [
        {"question_id": "color/a.jpg", "prompt": f"Is it {colour}?\nAnswer the question.", "text": answer}
        for colour, answer in (("blue", "No"), ("red", "Yes"))
    ]
    assert read_answers(write_rows(tmp_path / "answers.jsonl", rows), examples) == ["Yes", "No"]
    for row in rows:
        # LLaVA names most images in this way. The image need not exist.
        row["question_id"] = "color/images/a.png"
    assert read_answers(write_rows(tmp_path / "answers.jsonl", rows), examples) == ["Yes", "No"]


def test_llava_answers_to_uncounted_questions_of_scienceqa_are_ignored(tmp_path):
    problem = {"question": "Which?", "choices": ["cat", "dog"], "answer": 1, "image": "image.png"}
    problems = {"3": problem, "4": {**problem, "image": None}}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["3", "4"]}))
    rows = [
        {"question_id": "4", "prompt": "Which?", "text": "A"},
        {"question_id": "3", "prompt": "<image>\nWhich?", "text": "B"},
    ]
    answers = write_rows(tmp_path / "answers.jsonl", rows)
    out = tmp_path / "out"
    data = tmp_path / "problems.json"
    result = run(ScoreOptions(benchmark="scienceqa", data=data, answers=answers, out=out))
    assert result["headline"] == 100 and result["questions"] == 1


def test_llava_answers_to_textvqa_are_distinguished_by_their_prompt(tmp_path):
    rows = [
        {"question_id": n, "image_id": "0a1b", "question": f"What is {n}?", "answers": [str(n)] * 10}
        for n in (34602, 34603)
    ]
    data = tmp_path / "TextVQA_0.5.1_val.json"
    data.write_text(json.dumps({"data": rows}))
    examples = benchmark("textvqa").read(data, None)
    records = [
        {
            "question_id": "0a1b",
            "text": f"It: {n}",
            "prompt": f"What is {n}?\nReference OCR token: 34602\nShort.",
        }
        for n in (34603, 34602)
    ]
    answers = read_answers(write_rows(tmp_path / "answers.jsonl", records), examples)
    assert answers == ["It: 34602", "It: 34603"]
    records[1]["prompt"] = "What is 3?"
    with pytest.raises(DatasetError, match="the data has no question '0a1b'"):
        read_answers(write_rows(tmp_path / "answers.jsonl", records), examples)


def test_llava_answers_to_mmbench_name_their_rotation(tmp_path):
    line = ["7", "Which?", "cat", "dog", "B", image_base64()]
    (tmp_path / "m.tsv").write_text(
        "\t".join(["index", "question", "A", "B", "answer", "image"]) + "\n" + "\t".join(line)
    )
    examples = benchmark("mmbench").read(tmp_path / "m.tsv", None)
    rows = [{"question_id": 7, "round_id": turn, "text": text} for turn, text in ((1, "A"), (0, "B"))]
    assert read_answers(write_rows(tmp_path / "answers.jsonl", rows), examples) == ["B", "A"]


def test_answers_may_be_a_json_list_and_name_clips_by_path(tmp_path):
    (tmp_path / "esc50.csv").write_text("filename,category\na.wav,dog\nb.wav,rain\n")
    (tmp_path / "answers.json").write_text(
        json.dumps([{"audio_id": "/x/b.wav", "pred": "rain"}, {"audio_id": "a", "pred": "a dog"}])
    )
    out = tmp_path / "out"
    options = ScoreOptions(
        benchmark="esc50",
        data=tmp_path / "esc50.csv",
        answers=tmp_path / "answers.json",
        embedder="tfidf",
        out=out,
    )
    assert run(options)["headline"] == 100
    assert json.loads((out / "result.json").read_text())["settings"] == {"embedder": "tfidf"}


def test_the_help_names_every_benchmark():
    import inspect

    source = inspect.getsource(ScoreOptions)
    assert [name for name in BENCHMARKS if name not in source] == []


def test_a_benchmark_may_be_a_folder_and_nothing_is_written_for_a_wrong_name(tmp_path):
    answers = write_rows(tmp_path / "answers.jsonl", [{"id": 1, "prediction": "x"}])
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"'pop'.*choose instructions"):
        run(ScoreOptions(benchmark="pop", data=tmp_path, answers=answers, out=out))
    assert not out.exists()
    with pytest.raises(DatasetError, match=r"there is no coco_pope_random\.json"):
        run(ScoreOptions(benchmark="pope", data=tmp_path, answers=answers, out=out))
    with pytest.raises(ValueError, match="--answers"):
        run(ScoreOptions(data=answers, answers=tmp_path / "none", out=out))
