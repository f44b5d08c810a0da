"""MMMU's Parquet files: questions with marks such as <image 1>, options as a list written out as text."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from deepinsert.controller.metrics.contract import Example
from deepinsert.envs.chat_text import text_part
from deepinsert.envs.prompts import Prompt

from .encoded_images import from_struct
from .question_prompts import LETTER, SHORT_ANSWER, conversation, lettered
from .records import Row, parquet_files, read_parquet

MARK = re.compile(r"<image (\d)>")
COLUMNS = ("id", "question", "options", "answer", "question_type", "image_1")


def read_mmmu(data: Path, image_root: Path | None) -> list[Example]:
    """Examples of validation-*.parquet: of one subject, or of all below a folder. The image root is not used.

    Images stand where the question's marks stand, those without a mark before the text.
    """
    files = parquet_files(data, "validation")
    return [_example(row, path) for path in files for row in read_parquet(path, COLUMNS)]


def _example(row: Row, path: Path) -> Example:
    name = row.text("id")
    subject = re.sub(r"^(validation|dev|test)_|_\d+$", "", name)
    question = row.text("question")
    if row.text("question_type") == "multiple-choice":
        options = lettered(_texts(row, "options"))
        answers: tuple[str, ...] = (row.text("answer"),)
        if answers[0] not in options:
            row.fault("answer", f"{answers[0]!r} is no option; the test split is published without answers")
        lines = "\n".join(f"({letter}) {option}" for letter, option in options.items())
        text = f"{question}\n{lines}\n\n{LETTER}"
    else:
        options, answers = {}, tuple(_texts(row, "answer"))
        text = f"{question}\n\n{SHORT_ANSWER}"
    content, images = _placed(text, row, path, name)
    prompt = Prompt(name, subject, name, conversation(content, answers[0]), images, answers[0])
    return Example(prompt, answers, {"options": options})


def _texts(row: Row, field: str) -> list[str]:
    """A list of texts, which the files hold as one text in Python's notation; or the text itself."""
    value = row.values.get(field)
    if isinstance(value, list):
        return list(row.texts(field))
    text = row.text(field)
    if not text.lstrip().startswith("["):
        return [text]
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, list) or not found:
        row.fault(field, f"a list in brackets is expected, not {text[:40]!r}")
    return [str(item) for item in found]


def _placed(text: str, row: Row, path: Path, name: str) -> tuple[list[dict[str, str]], tuple]:
    """Content parts of a question with its images in place, and these images in their order."""
    there = [number for number in range(1, 8) if row.values.get(f"image_{number}") is not None]
    known = {number: from_struct(row, f"image_{number}", path, f"{name}.{number}") for number in there}
    named = {int(number) for number in MARK.findall(text)}
    order = [number for number in there if number not in named]
    content: list[dict[str, str]] = [{"type": "image"} for _ in order]
    pieces = MARK.split(text)  # text, number, text, number, ..., text
    for index, piece in enumerate(pieces):
        if index % 2:
            if int(piece) not in known:
                row.fault(f"image_{piece}", "the question names it, and there is none")
            order.append(int(piece))
            content.append({"type": "image"})
        elif piece.strip():
            content.append(text_part(piece.strip("\n")))
    return content, tuple(known[number] for number in order)
