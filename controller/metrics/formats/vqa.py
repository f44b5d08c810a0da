"""TextVQA, VQAv2 and OK-VQA as published, and LLaVA's question file with OCR tokens for TextVQA."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from deepinsert.controller.metrics.contract import Example
from deepinsert.envs.data.media import DatasetError
from deepinsert.envs.prompts import ImageRef

from .question_prompts import SHORT_ANSWER, ask, root_of
from .records import Row, beside, by_key, not_empty, read_jsonl, read_record

TEXTVQA_FILES = ("TextVQA_0.5.1_val.json", "TextVQA_0.5_val.json")


def read_textvqa(data: Path, image_root: Path | None) -> list[Example]:
    """Examples of TextVQA_0.5.1_val.json, or of LLaVA's llava_textvqa_val_v051_ocr.jsonl beside it.

    LLaVA's file has OCR tokens in its questions, as its published figures do; the other has not. Images are
    train_images/IMAGE_ID.jpg.
    """
    root = root_of(data, image_root, "train_images")
    if data.suffix == ".jsonl":
        truth = {}
        annotations = beside(data, TEXTVQA_FILES, "the answers")
        for row in read_record(annotations).rows("data"):
            truth[row.text("image_id"), row.text("question").lower()] = row
        return [_llava_textvqa(row, truth, annotations, root) for row in read_jsonl(data)]
    rows = not_empty(read_record(data).rows("data"), data)
    by_key(rows, "question_id")
    return [
        _textvqa(row, f"{row.text('question')}\n{SHORT_ANSWER}", f"{row.text('image_id')}.jpg", root)
        for row in rows
    ]


def _llava_textvqa(asked: Row, truth: dict[tuple[str, str], Row], annotations: Path, root: Path) -> Example:
    text = asked.text("text")
    key = (asked.text("question_id"), bare_question(text))
    if key not in truth:
        asked.fault("text", f"{annotations.name} has no such question about image {key[0]!r}")
    return _textvqa(truth[key], text, asked.text("image"), root)


def bare_question(text: str) -> str:
    """The question alone, in lower case, of a text with OCR tokens and an instruction around it.

    Three wordings are in use: "OCR tokens: ... Question: ... Short answer:", a line of reference OCR tokens
    before or after the question, and no OCR tokens.
    """
    if found := re.search(r"^OCR tokens: .*?Question: (.*?) Short answer:", text, re.DOTALL):
        return found[1].lower()
    lines = text.split("\n")
    return lines[1 if lines[0].startswith("Reference OCR token:") and len(lines) > 1 else 0].lower()


def _textvqa(row: Row, text: str, image: str, root: Path) -> Example:
    answers = row.texts("answers") if "answers" in row.values else ()
    if not answers:
        row.fault("answers", "none; the test split is published without, use the validation file")
    name = row.text("image_id")
    images = (ImageRef(root, image, row.where),)
    prompt = ask(row.text("question_id"), "textvqa", text, images, most_common(answers), name)
    return Example(prompt, answers, {"asked_as": (name, row.text("question").lower())})


def read_vqav2(data: Path, image_root: Path | None) -> list[Example]:
    """Examples of v2_OpenEnded_mscoco_val2014_questions.json with its annotations beside it."""
    return _read_coco(data, image_root, "vqav2")


def read_okvqa(data: Path, image_root: Path | None) -> list[Example]:
    """Examples of OpenEnded_mscoco_val2014_questions.json with its annotations beside it."""
    return _read_coco(data, image_root, "okvqa")


def _read_coco(data: Path, image_root: Path | None, name: str) -> list[Example]:
    if "questions" not in data.name:
        raise DatasetError(f"{data}: give the file of questions (...OpenEnded_mscoco_val2014_questions.json)")
    asked = read_record(data)
    named = data.name.replace("OpenEnded_", "").replace("questions", "annotations")
    answered = beside(data, (named,), "the answers")
    truth = by_key(read_record(answered).rows("annotations"), "question_id")
    subset = asked.text("data_subtype")
    root = root_of(data, image_root, subset)
    rows = not_empty(asked.rows("questions"), data)
    by_key(rows, "question_id")
    examples = []
    for row in rows:
        number = row.text("question_id")
        if number not in truth:
            row.fault("question_id", f"{number} is not in {answered.name}; do both belong together?")
        examples.append(_coco(row, truth[number], subset, root, name))
    return examples


def _coco(row: Row, truth: Row, subset: str, root: Path, name: str) -> Example:
    references = tuple(answer.text("answer") for answer in truth.rows("answers"))
    if not references:
        truth.fault("answers", "none; is it the annotation file of a split with answers?")
    image = row.whole("image_id")
    images = (ImageRef(root, f"COCO_{subset}_{image:012d}.jpg", row.where),)
    question = f"{row.text('question')}\n{SHORT_ANSWER}"
    answer = truth.text("multiple_choice_answer", most_common(references))
    prompt = ask(row.text("question_id"), name, question, images, answer, str(image))
    return Example(prompt, references, {"answer_type": truth.text("answer_type", "other")})


def most_common(answers: tuple[str, ...]) -> str:
    """The answer most people gave; of several the first."""
    return Counter(answers).most_common(1)[0][0]
