"""MMMU's Parquet files: questions with marks such as <image 1>, and options written as a Python list."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from deepinsert.controller.metrics.contract import Example
from deepinsert.envs.chat_text import text_part
from deepinsert.envs.prompts import EncodedImage, Prompt

from .encoded_images import from_struct
from .question_prompts import LETTER, SHORT_ANSWER, conversation, options_by_letter
from .records import Row, parquet_files, read_parquet

MARK = re.compile(r"<image (\d)>")
COLUMNS = ("id", "question", "options", "answer", "question_type", "image_1")


def read_mmmu(data: Path, image_root: Path | None) -> list[Example]:
    """Read validation-*.parquet of one subject, or of all subjects below a folder.

    Images stand where the question's marks stand; those without a mark come before the text. The image root
    is not used.
    """
    files = parquet_files(data, "validation")
    return [_example(row, path) for path in files for row in read_parquet(path, COLUMNS)]


def _example(row: Row, path: Path) -> Example:
    """Return the question of one row."""
    name = row.text("id")
    subject = re.sub(r"^(validation|dev|test)_|_\d+$", "", name)
    question = row.text("question")
    if row.text("question_type") == "multiple-choice":
        options = options_by_letter(_texts(row, "options"))
        answers: tuple[str, ...] = (row.text("answer"),)
        if answers[0] not in options:
            row.fault("answer", f"{answers[0]!r} is no option; the test split is published without answers")
        lines = "\n".join(f"({letter}) {option}" for letter, option in options.items())
        text = f"{question}\n{lines}\n\n{LETTER}"
    else:
        options, answers = {}, tuple(_texts(row, "answer"))
        text = f"{question}\n\n{SHORT_ANSWER}"
    content, images = _with_images_in_place(text, row, path, name)
    prompt = Prompt(name, subject, name, conversation(content, answers[0]), images, answers[0])
    return Example(prompt, answers, {"options": options})


def _texts(row: Row, field: str) -> list[str]:
    """Return a list of texts, which the files hold as one text in Python's notation, or a single text."""
    value = row.values.get(field)
    if isinstance(value, list):
        return list(row.texts(field))
    text = row.text(field)
    if not text.lstrip().startswith("["):
        return [text]
    try:
        items = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        items = None
    if not isinstance(items, list) or not items:
        row.fault(field, f"a list in brackets is expected, not {text[:40]!r}")
    return [str(item) for item in items]


def _with_images_in_place(
    text: str, row: Row, path: Path, name: str
) -> tuple[list[dict[str, str]], tuple[EncodedImage, ...]]:
    """Return the content parts of a question with its images in place, and these images in their order."""
    numbers = [number for number in range(1, 8) if row.values.get(f"image_{number}") is not None]
    images = {number: from_struct(row, f"image_{number}", path, f"{name}.{number}") for number in numbers}
    marked = {int(number) for number in MARK.findall(text)}
    order = [number for number in numbers if number not in marked]
    content: list[dict[str, str]] = [{"type": "image"} for _ in order]
    pieces = MARK.split(text)  # text, number, text, number, ..., text
    for index, piece in enumerate(pieces):
        if index % 2:
            if int(piece) not in images:
                row.fault(f"image_{piece}", "the question names this image, but there is none")
            order.append(int(piece))
            content.append({"type": "image"})
        elif piece.strip():
            content.append(text_part(piece.strip("\n")))
    return content, tuple(images[number] for number in order)
