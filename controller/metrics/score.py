"""`deepinsert score`: scores answers by a benchmark's rule, also answers that other software made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from deepinsert.controller.metrics.formats.mmbench import MILLION
from deepinsert.controller.metrics.formats.records import Row, read_jsonl
from deepinsert.controller.metrics.formats.vqa import bare_question
from deepinsert.controller.options import ScoreOptions
from deepinsert.controller.runs.atomic_files import atomic_file
from deepinsert.controller.runs.command import run_command
from deepinsert.envs.data.media import DatasetError

from .benchmark import benchmark, question_rows
from .contract import Benchmark, Example, Score

ID_FIELDS = ("id", "question_id", "questionId", "image_id", "audio_id")
ANSWER_FIELDS = ("prediction", "text", "answer", "caption", "pred")
IDS_IN_MESSAGE = 5


def run(options: ScoreOptions) -> dict[str, Any]:
    """Write `scores.jsonl`, with the score of each example, and `result.json`; return the result.

    Raises:
        ValueError: there is no such benchmark or setting, or an option cannot be used.
        DatasetError: data or answers cannot be used, or do not belong together.
    """
    entry = benchmark(
        options.benchmark, embedder=options.embedder, tokenizer=options.tokenizer, metrics=options.metrics
    )
    return run_command(options, partial(score_answers, options, entry), summary)


def score_answers(options: ScoreOptions, entry: Benchmark, out: Path) -> dict[str, Any]:
    """Score the answers that the options name, write `scores.jsonl` to `out`, and return the result."""
    examples = entry.read(options.data, options.image_root)
    answers = read_answers(options.answers, examples, entry.ignores_record)
    score = entry.score(answers, examples)
    write_scores(out / "scores.jsonl", answers, examples, score)
    return {
        "benchmark": entry.name,
        "rule": entry.source,
        "settings": dict(entry.settings),
        "headline": score.headline,
        "unit": score.unit,
        "details": score.details,
        "questions": len(question_rows(examples)),
        "answers": len(answers),
    }


def read_answers(
    path: Path, examples: Sequence[Example], ignores_record: Callable[[Row], bool] | None = None
) -> list[str]:
    """Read one answer per example, in their order, from a file of records with an id and a text.

    LLaVA's answers to TextVQA and MME have the image's name as their id, so their prompt distinguishes the
    questions. Its answers to MMBench hold the rotation as "round_id". A clip may be named by its path.

    Args:
        path: the file of answers, JSON lines or a JSON list.
        examples: the questions (P).
        ignores_record: whether a record answers a question that the benchmark does not count.

    Raises:
        DatasetError: a question has no answer or two, or a record has the id of no question.
    """
    row_of_id = {example.prompt.id: row for row, example in enumerate(examples)}
    row_of_question = {
        example.facts["image_and_question"]: row
        for row, example in enumerate(examples)
        if "image_and_question" in example.facts
    }
    answers: dict[int, tuple[str, Row]] = {}
    for record in read_jsonl(path):
        if ignores_record is not None and ignores_record(record):
            continue
        row = _row_of(record, row_of_id, row_of_question)
        if row in answers:
            name, first = examples[row].prompt.id, answers[row][1].origin
            raise DatasetError(f"{record.origin}: {name!r} was already answered in {first}")
        answers[row] = _answer_in(record), record
    missing = [example.prompt.id for row, example in enumerate(examples) if row not in answers]
    if missing:
        names = ", ".join(map(repr, missing[:IDS_IN_MESSAGE]))
        names += ", ..." if len(missing) > IDS_IN_MESSAGE else ""
        raise DatasetError(
            f"{path}: there is no answer to {len(missing)} of {len(examples)} questions ({names}); "
            "was the model still running, or are they another split's answers?"
        )
    return [answers[row][0] for row in range(len(examples))]


def _row_of(record: Row, row_of_id: Mapping[str, int], row_of_question: Mapping[tuple[str, str], int]) -> int:
    """Return the row of the example that a record answers."""
    field = next((field for field in ID_FIELDS if field in record.values), None)
    if field is None:
        record.fault("id", f"the answer does not name its question; give one of {', '.join(ID_FIELDS)}")
    name = record.text(field)
    if record.has("round_id") and name.isdecimal():
        name = str(int(name) + record.whole("round_id") * MILLION)
    for key in (name, name.rpartition("/")[2], Path(name).stem):
        if key in row_of_id:
            return row_of_id[key]
    if record.has("prompt"):
        question = bare_question(record.text("prompt"))
        for image in (name, f"{name.partition('/')[0]}/{Path(name).stem}"):  # MME's are CATEGORY/.../NAME.jpg
            if (image, question) in row_of_question:
                return row_of_question[image, question]
    record.fault(
        field,
        f"the data has no question {name!r} (its first is {next(iter(row_of_id))!r}); do the answers belong "
        "to this data?",
    )


def _answer_in(record: Row) -> str:
    """Return the answer that a record holds; a blank answer is an answer."""
    fields = [field for field in ANSWER_FIELDS if field in record.values]
    if not fields:
        record.fault("prediction", f"the record has no answer; give one of {', '.join(ANSWER_FIELDS)}")
    field = fields[0]
    if field != ANSWER_FIELDS[0] and len({str(record.values[name]) for name in fields}) > 1:
        record.fault(
            field,
            f"it could be the answer, and {fields[1]!r} could be too; rename the answer to "
            f"{ANSWER_FIELDS[0]!r}",
        )
    value = record.values[field]
    return value if isinstance(value, str) and not value.strip() else record.text(field)


def write_scores(path: Path, answers: Sequence[str], examples: Sequence[Example], score: Score) -> None:
    """Write one line per example: id, source, prediction, references, and its score.

    Args:
        path: the file of scores.
        answers: one answer per example.
        examples: the questions (P).
        score: the score of the answers; the score of an example is null if the rule is not per question.
    """
    lines = [
        {
            "id": example.prompt.id,
            "source": example.prompt.source,
            "prediction": answer,
            "references": list(example.references),
            "score": None if score.items is None else float(score.items[row]),
        }
        for row, (answer, example) in enumerate(zip(answers, examples, strict=True))
    ]
    with atomic_file(path) as temporary:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        temporary.write_text(text, encoding="utf-8")


def summary(result: Mapping[str, Any]) -> str:
    """Render the result for a terminal: the headline, then the details."""
    settings = "".join(f", {key} {value}" for key, value in result["settings"].items() if value)
    lines = [
        f"{result['benchmark']}: {result['unit']} {result['headline']:.2f} "
        f"({result['questions']} questions{settings})"
    ]
    width = max(map(len, result["details"]), default=0)
    lines += [f"  {name:{width}}  {value:.2f}" for name, value in result["details"].items()]
    return "\n".join(lines)
