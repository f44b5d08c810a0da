"""`deepinsert score`: what answers earn by a benchmark's rule, wherever they were made."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deepinsert.controller.metrics.formats.mmbench import MILLION
from deepinsert.controller.metrics.formats.records import Row, read_jsonl
from deepinsert.controller.metrics.formats.vqa import bare_question
from deepinsert.controller.option_checks import check
from deepinsert.controller.options import ScoreOptions
from deepinsert.controller.runs.atomic_files import atomic_file
from deepinsert.controller.runs.folder import read_result, start_run, write_result
from deepinsert.envs.data.media import DatasetError

from .benchmark import benchmark, questions
from .contract import Example, Score

IDS = ("id", "question_id", "questionId", "image_id", "audio_id")
TEXTS = ("prediction", "text", "answer", "caption", "pred")
NAMED = 5  # ids that an error shows


def run(options: ScoreOptions) -> dict[str, Any]:
    """Write `scores.jsonl`, what each example earned, and `result.json`; return the result.

    Raises `ValueError` for a benchmark or setting that there is not, `DatasetError` for data and answers that
    cannot be used or do not belong together.
    """
    check(options)
    entry = benchmark(
        options.benchmark, embedder=options.embedder, tokenizer=options.tokenizer, metrics=options.metrics
    )
    out = start_run(options)
    if (out / "result.json").is_file():
        result = read_result(out)
        print(table(result))
        return result
    examples = entry.read(options.data, options.image_root)
    answers = read_answers(options.answers, examples, entry.passed_over)
    found = entry.score(answers, examples)
    write_scores(out / "scores.jsonl", answers, examples, found)
    result = {
        "benchmark": entry.name,
        "rule": entry.source,
        "settings": dict(entry.settings),
        "headline": found.headline,
        "unit": found.unit,
        "details": found.details,
        "questions": len(questions(examples)),
        "answers": len(answers),
    }
    write_result(out, result)
    print(table(result))
    return result


def read_answers(
    path: Path, examples: Sequence[Example], passed_over: Callable[[Row], bool] | None = None
) -> list[str]:
    """One answer for each example, in their order, from a file of records with an id and a text.

    LLaVA's answers to TextVQA and MME have the image's name as their id; their prompt tells questions apart.
    Its answers to MMBench say the rotation as "round_id". A clip may be named by its path. `passed_over` says
    which records answer what the benchmark does not count. Raises `DatasetError` that names ids without an
    answer, ids with two and ids of no question.
    """
    places = {example.prompt.id: place for place, example in enumerate(examples)}
    asked = {
        example.facts["asked_as"]: place
        for place, example in enumerate(examples)
        if "asked_as" in example.facts
    }
    found: dict[int, tuple[str, Row]] = {}
    for row in read_jsonl(path):
        if passed_over is not None and passed_over(row):
            continue
        place = _place(row, places, asked)
        if place in found:
            name = examples[place].prompt.id
            raise DatasetError(f"{row.where}: {name!r} was already answered in {found[place][1].where}")
        found[place] = _said(row), row
    missing = [example.prompt.id for place, example in enumerate(examples) if place not in found]
    if missing:
        shown = ", ".join(map(repr, missing[:NAMED])) + (", ..." if len(missing) > NAMED else "")
        raise DatasetError(
            f"{path}: no answer to {len(missing)} of {len(examples)} questions ({shown}); "
            "was the model still running, or are they another split's answers?"
        )
    return [found[place][0] for place in range(len(examples))]


def _place(row: Row, places: dict[str, int], asked: dict[tuple[str, str], int]) -> int:
    """Position of the example that an answer belongs to."""
    field = next((field for field in IDS if field in row.values), None)
    if field is None:
        row.fault("id", f"the answer does not say its question; give one of {', '.join(IDS)}")
    name = row.text(field)
    if row.has("round_id") and name.isdecimal():
        name = str(int(name) + row.whole("round_id") * MILLION)
    keys: list[Any] = [name, name.rpartition("/")[2], Path(name).stem]
    for key in keys:
        if key in places:
            return places[key]
    if row.has("prompt"):
        question = bare_question(row.text("prompt"))
        for image in (name, f"{name.partition('/')[0]}/{Path(name).stem}"):  # MME's are CATEGORY/.../NAME.jpg
            if (image, question) in asked:
                return asked[image, question]
    row.fault(
        field,
        f"the data has no question {name!r} (its first is {next(iter(places))!r}); are they the "
        "answers to it?",
    )


def _said(row: Row) -> str:
    fields = [field for field in TEXTS if field in row.values]
    if not fields:
        row.fault("prediction", f"no answer; give one of {', '.join(TEXTS)}")
    field = fields[0]
    if field != TEXTS[0] and len({str(row.values[each]) for each in fields}) > 1:
        row.fault(field, f"it could be the answer, and so could {fields[1]!r}; call the model's {TEXTS[0]!r}")
    value = row.values[field]
    return value if isinstance(value, str) and not value.strip() else row.text(field)


def write_scores(path: Path, answers: Sequence[str], examples: Sequence[Example], found: Score) -> None:
    """A line for each example: id, source, prediction, references, and what it earned (null where the rule is
    not per question)."""
    rows = [
        {
            "id": example.prompt.id,
            "source": example.prompt.source,
            "prediction": answer,
            "references": list(example.references),
            "score": None if found.items is None else float(found.items[place]),
        }
        for place, (answer, example) in enumerate(zip(answers, examples, strict=True))
    ]
    with atomic_file(path) as temporary:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        temporary.write_text("".join(lines), encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """The result for a terminal: the headline, then the details."""
    settings = "".join(f", {key} {value}" for key, value in result["settings"].items() if value)
    lines = [
        f"{result['benchmark']}: {result['unit']} {result['headline']:.2f} "
        f"({result['questions']} questions{settings})"
    ]
    width = max(map(len, result["details"]), default=0)
    lines += [f"  {name:{width}}  {value:.2f}" for name, value in result["details"].items()]
    return "\n".join(lines)
