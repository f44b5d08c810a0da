"""TextVQA, VQAv2 and OK-VQA as published, and LLaVA's question file with OCR tokens for TextVQA."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from deepinsert.controller.metrics.contract import Example
from deepinsert.envs.data.media import DatasetError
from deepinsert.envs.prompts import ImageRef

from .question_prompts import SHORT_ANSWER, image_root_of, question_prompt
from .records import Row, by_key, file_beside, not_empty, read_jsonl, read_record

TEXTVQA_FILES = ("TextVQA_0.5.1_val.json", "TextVQA_0.5_val.json")


def read_textvqa(data: Path, image_root: Path | None) -> list[Example]:
    """Read TextVQA_0.5.1_val.json, or LLaVA's llava_textvqa_val_v051_ocr.jsonl beside it.

    The questions in LLaVA's file contain OCR tokens, on which its published figures are based; the others do
    not. Images are train_images/IMAGE_ID.jpg.
    """
    root = image_root_of(data, image_root, "train_images")
    if data.suffix == ".jsonl":
        truth = {}
        annotations = file_beside(data, TEXTVQA_FILES, "the answers")
        for row in read_record(annotations).rows("data"):
            truth[row.text("image_id"), row.text("question").lower()] = row
        return [_llava_textvqa(row, truth, annotations, root) for row in read_jsonl(data)]
    rows = not_empty(read_record(data).rows("data"), data)
    by_key(rows, "question_id")
    return [
        _textvqa(row, f"{row.text('question')}\n{SHORT_ANSWER}", f"{row.text('image_id')}.jpg", root)
        for row in rows
    ]


def _llava_textvqa(
    question: Row, truth: Mapping[tuple[str, str], Row], annotations: Path, root: Path
) -> Example:
    """Return a question of LLaVA's file with the answers to it.

    Args:
        question: LLaVA's record.
        truth: the published questions by image and text.
        annotations: the file of `truth`, for messages.
        root: the folder of the images.
    """
    text = question.text("text")
    key = (question.text("question_id"), bare_question(text))
    if key not in truth:
        question.fault("text", f"{annotations.name} has no such question about image {key[0]!r}")
    return _textvqa(truth[key], text, question.text("image"), root)


def bare_question(text: str) -> str:
    """Return the question alone, in lower case, of a text with OCR tokens and an instruction around it.

    Three wordings are in use: "OCR tokens: ... Question: ... Short answer:", a line of reference OCR tokens
    before or after the question, and no OCR tokens.
    """
    if match := re.search(r"^OCR tokens: .*?Question: (.*?) Short answer:", text, re.DOTALL):
        return match[1].lower()
    lines = text.split("\n")
    return lines[1 if lines[0].startswith("Reference OCR token:") and len(lines) > 1 else 0].lower()


def _textvqa(row: Row, text: str, image: str, root: Path) -> Example:
    """Return one question.

    Args:
        row: the published record.
        text: the text that the model receives.
        image: the path of the image below `root`.
        root: the folder of the images.
    """
    answers = row.texts("answers") if "answers" in row.values else ()
    if not answers:
        row.fault("answers", "there is none; the test split is published without, so use the validation file")
    image_id = row.text("image_id")
    images = (ImageRef(root, image, row.origin),)
    prompt = question_prompt(row.text("question_id"), "textvqa", text, images, most_common(answers), image_id)
    return Example(prompt, answers, {"image_and_question": (image_id, row.text("question").lower())})


def read_vqav2(data: Path, image_root: Path | None) -> list[Example]:
    """Read v2_OpenEnded_mscoco_val2014_questions.json with its annotations beside it."""
    return _read_coco(data, image_root, "vqav2")


def read_okvqa(data: Path, image_root: Path | None) -> list[Example]:
    """Read OpenEnded_mscoco_val2014_questions.json with its annotations beside it."""
    return _read_coco(data, image_root, "okvqa")


def _read_coco(data: Path, image_root: Path | None, name: str) -> list[Example]:
    """Read a file of questions about COCO's images for the benchmark `name`."""
    if "questions" not in data.name:
        raise DatasetError(f"{data}: give the file of questions (...OpenEnded_mscoco_val2014_questions.json)")
    record = read_record(data)
    annotations_name = data.name.replace("OpenEnded_", "").replace("questions", "annotations")
    annotations = file_beside(data, (annotations_name,), "the answers")
    truth = by_key(read_record(annotations).rows("annotations"), "question_id")
    subset = record.text("data_subtype")
    root = image_root_of(data, image_root, subset)
    rows = not_empty(record.rows("questions"), data)
    by_key(rows, "question_id")
    examples = []
    for row in rows:
        question_id = row.text("question_id")
        if question_id not in truth:
            row.fault("question_id", f"{question_id} is not in {annotations.name}; do both belong together?")
        examples.append(_coco(row, truth[question_id], subset, root, name))
    return examples


def _coco(row: Row, truth: Row, subset: str, root: Path, name: str) -> Example:
    """Return one question.

    Args:
        row: the record of the question.
        truth: the record of its answers.
        subset: the subset of COCO, such as val2014, which is part of the image's name.
        root: the folder of the images.
        name: the benchmark.
    """
    references = tuple(answer.text("answer") for answer in truth.rows("answers"))
    if not references:
        truth.fault("answers", "there is none; is it the annotation file of a split with answers?")
    image_id = row.whole("image_id")
    images = (ImageRef(root, f"COCO_{subset}_{image_id:012d}.jpg", row.origin),)
    question = f"{row.text('question')}\n{SHORT_ANSWER}"
    answer = truth.text("multiple_choice_answer", most_common(references))
    prompt = question_prompt(row.text("question_id"), name, question, images, answer, str(image_id))
    return Example(prompt, references, {"answer_type": truth.text("answer_type", "other")})


def most_common(answers: tuple[str, ...]) -> str:
    """Return the most frequent answer; of several, the first one."""
    return Counter(answers).most_common(1)[0][0]
