"""Evaluation on benchmarks: their own score, significance, and questions without a reference."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepinsert.backbones import Backbone
from deepinsert.controller.evaluation import evaluate, report
from deepinsert.controller.evaluation.comparison import Comparison, Predictions, by_source
from deepinsert.controller.evaluation.variants import Variant
from deepinsert.controller.metrics.benchmark import BENCHMARKS, Benchmark, Example, Score
from deepinsert.controller.options import EvaluateOptions, ReportOptions
from deepinsert.controller.statistics import mcnemar
from deepinsert.envs.data.instructions import load_instructions
from deepinsert.envs.prompts import Prompt, prompts_from


@pytest.fixture(scope="module")
def pope(rendered_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write POPE's three files about rendered images."""
    folder = tmp_path_factory.mktemp("pope")
    data = load_instructions(rendered_data, sources=("gqa",))
    questions = [(record, turn) for record in data for turn in record.turns if turn.answer in ("yes", "no")]
    assert len(questions) > 8
    for number, category in enumerate(("random", "popular", "adversarial")):
        rows = [
            {"question_id": row, "image": record.images[0], "text": turn.question, "label": turn.answer}
            for row, (record, turn) in enumerate(questions[number * 3 : number * 3 + 6])
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"coco_pope_{category}.json").write_text(text)
    return folder


@pytest.fixture(scope="module")
def options(pope: Path, rendered_data: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluateOptions:
    return EvaluateOptions(
        out=tmp_path_factory.mktemp("runs") / "pope",
        data=pope,
        image_root=rendered_data.parent,
        benchmark="pope",
        insert_layers="0,8",
        batch_size=4,
        max_new_tokens=4,
        timing_repeats=1,
        device="cpu",
    )


def rows_of(options: EvaluateOptions, name: str) -> list[dict[str, Any]]:
    path = options.out / "predictions" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_published_benchmark_gives_its_own_number(
    result: dict[str, Any], options: EvaluateOptions, pope: Path
) -> None:
    examples = BENCHMARKS["pope"].read(pope, options.image_root)
    assert result["benchmark"]["name"] == "pope" and result["prompts"] == len(examples) > 12
    for row, name in zip(result["variants"], ("fixed-0", "fixed-8"), strict=True):
        rows = rows_of(options, name)
        score = BENCHMARKS["pope"].score([each["prediction"] for each in rows], examples)
        assert row["unit"] == "F1" and row["score"] == pytest.approx(score.headline)
        assert row["details"] == pytest.approx(score.details)
        assert [each["score"] for each in rows] == score.items.tolist()
        assert [each["correct"] for each in rows] == (score.items == 1).tolist()
        assert row["accuracy"] == pytest.approx(score.items.mean())
        low, high = row["score_interval"]
        assert 0 <= low <= high <= 100
        assert row["per_source"].keys() == {"random", "popular", "adversarial"}
    first, second = result["variants"]
    assert first["score"] > second["score"], "at the last layer the model does not see the image"
    assert second["score_difference"] == pytest.approx(second["score"] - first["score"])
    assert first["score_difference"] == 0 == first["score_difference_interval"][0]


def test_significance_is_mcnemars_test_on_the_same_questions(
    result: dict[str, Any], options: EvaluateOptions
) -> None:
    first, second = ([row["score"] for row in rows_of(options, name)] for name in ("fixed-0", "fixed-8"))
    significance = result["variants"][1]["significance"]
    variant, baseline, p_value = mcnemar(second, first)
    assert (significance["only_variant"], significance["only_baseline"]) == (
        variant,
        baseline,
    ) and baseline > variant
    assert significance["p_value"] == pytest.approx(p_value) and significance["test"] == "McNemar"
    assert result["variants"][0]["significance"] is None


def test_throughput_is_measured_everywhere_and_memory_on_cuda(result: dict[str, Any]) -> None:
    for row in result["variants"]:
        low, high = row["questions_per_second_quartiles"]
        assert 0 < low <= row["questions_per_second"] <= high
        assert row["tokens_per_second"] >= row["questions_per_second"], "every answer has a token"
        assert row["peak_memory_bytes"] is None


def test_an_interrupted_run_keeps_its_answers(result: dict[str, Any], options: EvaluateOptions) -> None:
    paths = sorted((options.out / "predictions").iterdir())
    before = [path.stat().st_mtime_ns for path in paths]
    (options.out / "result.json").unlink()
    again = evaluate.run(options)
    assert [path.stat().st_mtime_ns for path in paths] == before
    for first, second in zip(result["variants"], again["variants"], strict=True):
        for name in ("score", "score_interval", "details", "accuracy", "loss", "significance"):
            assert first[name] == second[name]


def test_questions_that_cannot_be_put_to_a_model_are_refused(options: EvaluateOptions) -> None:
    with pytest.raises(ValueError, match=r"--benchmark esc50: its questions.*deepinsert score"):
        evaluate.run(replace(options, out=options.out / "z", benchmark="esc50"))


def test_a_share_is_drawn_by_image_and_sources_are_refused(options: EvaluateOptions) -> None:
    whole, _ = evaluate.read_examples(options, BENCHMARKS["pope"])
    half, _ = evaluate.read_examples(replace(options, fraction=0.5), BENCHMARKS["pope"])
    images = {example.prompt.image_key for example in half}
    assert 0 < len(half) < len(whole)
    assert [e.prompt.id for e in half] == [e.prompt.id for e in whole if e.prompt.image_key in images]
    with pytest.raises(ValueError, match="--sources coco: --benchmark pope has no sources"):
        evaluate.run(replace(options, out=options.out / "x", sources="coco"))
    with pytest.raises(ValueError, match=r"--benchmark 'nocaps'.*instructions"):
        evaluate.run(replace(options, out=options.out / "y", benchmark="nocaps"))


def variety(answers: Sequence[str], examples: Sequence[Example]) -> Score:
    """Score all answers together: the share of different answers."""
    return Score(100 * len(set(answers)) / len(answers), "variety", None, {"answers": 1.0 * len(answers)})


@pytest.fixture
def benchmark_without_references(monkeypatch: pytest.MonkeyPatch) -> str:
    """Register a benchmark whose rule is not per question and whose questions have no reference."""

    def read(data: Path, image_root: Path | None) -> list[Example]:
        prompts = prompts_from(load_instructions(data, image_root, sources=("coco",), fraction=0.3))
        return [Example(without_answer(prompt), ()) for prompt in prompts]

    monkeypatch.setitem(BENCHMARKS, "variety", Benchmark("variety", "tests", read, variety))
    return "variety"


def without_answer(prompt: Prompt) -> Prompt:
    blank = {"role": "assistant", "content": [{"type": "text", "text": ""}]}
    return replace(prompt, messages=[*prompt.messages[:-1], blank], answer="")


def test_a_benchmark_without_references_has_a_score_and_no_loss(
    benchmark_without_references: str,
    options: EvaluateOptions,
    rendered_data: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    changed = replace(
        options, out=tmp_path / "run", data=rendered_data, benchmark=benchmark_without_references
    )
    evaluate.run(changed)
    result = json.loads((changed.out / "result.json").read_text())
    for row, name in zip(result["variants"], ("fixed-0", "fixed-8"), strict=True):
        answers = [each["prediction"] for each in rows_of(changed, name)]
        assert row["score"] == pytest.approx(100 * len(set(answers)) / len(answers))
        low, high = row["score_interval"]
        assert low < high and row["flops"] > 0
        for empty in ("loss", "loss_interval", "loss_difference", "accuracy", "accuracy_interval"):
            assert row[empty] is None and row["per_source"]["coco"][empty] is None
        assert row["significance"] is None
        assert {each["loss"] for each in rows_of(changed, name)} == {None}
        assert {each["score"] for each in rows_of(changed, name)} == {None}
    assert "variety" in capsys.readouterr().out
    assert (changed.out / "evaluate.png").is_file() and (changed.out / "figure1.png").is_file()
    assert json.loads((changed.out / "table1.json").read_text())["columns"][0]["unit"] == "variety"


def test_several_evaluations_make_one_table(
    result: dict[str, Any], options: EvaluateOptions, rendered_data: Path, tmp_path: Path
) -> None:
    instructions = replace(
        options,
        out=tmp_path / "own",
        data=rendered_data,
        benchmark="instructions",
        sources="gqa,text",
        fraction=0.2,
    )
    evaluate.run(instructions)
    runs = (options.out, instructions.out)
    table = report.run(ReportOptions(out=tmp_path / "report", runs=runs))
    assert [column["name"] for column in table["columns"]] == ["pope", "own gqa", "own text"]
    first = table["rows"][0]
    assert first["average"] == pytest.approx(np.mean([score["score"] for score in first["scores"]]))
    text = (tmp_path / "report" / "table1.md").read_text()
    assert "| pope (F1) | own gqa | own text | average |" in text.splitlines()[0]
    assert (tmp_path / "report" / "figure1.png").is_file()
    with pytest.raises(ValueError, match="does not hold a finished evaluate"):
        report.run(ReportOptions(out=tmp_path / "other", runs=(tmp_path / "report",)))


def comparison(
    backbone: Backbone, examples: list[Example], score: Any, answers: list[list[str]]
) -> Comparison:
    """Return a comparison of the answers of each variant, without measurements."""
    variants = [
        Variant.fixed(str(number), None, backbone, len(examples), 0) for number in range(len(answers))
    ]
    no_losses = np.full(len(examples), math.nan)
    predictions = [
        Predictions(texts, score(texts, examples), no_losses, np.ones((len(examples), 2)))
        for texts in answers
    ]
    groups = by_source([example.prompt for example in examples])
    rule = Benchmark("own", "tests", lambda data, root: examples, score)
    return Comparison(variants, rule, examples, predictions, groups, {}, [], 200)


def test_rotations_of_a_question_count_once(tiny_backbone: Backbone) -> None:
    def circular(answers: Sequence[str], examples: Sequence[Example]) -> Score:
        right: dict[Any, list[bool]] = {}
        for answer, example in zip(answers, examples, strict=True):
            right.setdefault(example.facts["group"], []).append(answer == example.references[0])
        items = np.array([float(all(right[example.facts["group"]])) for example in examples])
        groups = np.mean([all(each) for each in right.values()])
        return Score(100 * float(groups), "circular accuracy", items)

    examples = []
    for question, rotations in enumerate((4, 2, 3, 2)):
        for number in range(rotations):
            question_prompt = Prompt.from_question(f"{question}, {number}?")
            prompt = replace(question_prompt, id=f"{question}#{number}", image_key=f"{question}.png")
            examples.append(Example(prompt, ("A",), {"group": question}))
    first = ["A"] * 11
    second = ["A"] * 3 + ["B"] + ["A"] * 2 + ["B"] + ["A"] * 4  # the first and the third question are wrong
    compared = comparison(tiny_backbone, examples, circular, [first, second])
    row = compared.significance(1, "")
    assert row == {"test": "McNemar", "only_variant": 0, "only_baseline": 2, "p_value": 0.5}
    scores = compared.scores(1)
    assert scores["score"] == 50 and scores["score_difference"] == -50
    assert scores["score_interval"][0] >= 0 and scores["score_difference_interval"] == [-100, 0]
    means = compared.mean_and_difference(
        "accuracy", *(compared.predictions[index].score.items for index in (1, 0)), compared.question_rows("")
    )
    assert means["accuracy"] == 0.5, "the mean is over four questions, not eleven rows"


def test_each_copy_of_an_image_in_a_sample_is_a_separate_image(tiny_backbone: Backbone) -> None:
    def both_right(answers: Sequence[str], examples: Sequence[Example]) -> Score:
        images: dict[str, list[bool]] = {}
        for answer, example in zip(answers, examples, strict=True):
            images.setdefault(example.prompt.image_key, []).append(answer == "yes")
        assert {len(each) for each in images.values()} == {2}
        return Score(100.0 * sum(map(all, images.values())), "points", None)

    examples = []
    for image in range(6):
        for question in range(2):
            prompt = Prompt.from_question(f"{question}?")
            prompt = replace(prompt, id=f"{image}#{question}", image_key=f"{image}.png")
            examples.append(Example(prompt, ("yes",)))
    always, never = ["yes"] * 12, ["no"] * 12
    scores = comparison(tiny_backbone, examples, both_right, [always, never]).scores(0)
    assert scores["score"] == 600 and scores["score_interval"] == [600, 600]


def test_scores_between_wrong_and_right_have_no_mcnemar_test(tiny_backbone: Backbone) -> None:
    def soft(answers: Sequence[str], examples: Sequence[Example]) -> Score:
        items = np.array([float(answer) for answer in answers])
        return Score(100 * float(items.mean()), "accuracy", items)

    examples = [
        Example(replace(Prompt.from_question("?"), id=str(row), image_key=str(row)), ()) for row in range(20)
    ]
    answers = [["0.3"] * 20, ["0.9"] * 10 + ["0.6"] * 10]
    compared = comparison(tiny_backbone, examples, soft, answers)
    assert compared.significance(1, "") is None
    low, high = compared.scores(1)["score_difference_interval"]
    assert 30 < low < 45 < high < 60
