"""MMBench's TSV with base64 images.

A file may hold the rotations of each question (indices above a million, as VLMEvalKit's files) or only the
questions as published; then the rotations are made here.
"""

from __future__ import annotations

from pathlib import Path

from deepinsert.controller.metrics.contract import Example
from deepinsert.envs.prompts import EncodedImage

from .encoded_images import from_base64
from .question_prompts import LETTER, LETTERS, ask, lettered, with_options
from .records import Row, by_key, read_table

MILLION = 1_000_000
COLUMNS = ("index", "question", "A", "B", "answer", "image")


def read_mmbench(data: Path, image_root: Path | None) -> list[Example]:
    """Examples of mmbench_dev_20230712.tsv and the like: every rotation of every question's options.

    Ids are the index, plus a million for each further rotation. The image root is not used.
    """
    rows = list(by_key(read_table(data, "\t", COLUMNS), "index").values())
    rotated = any(row.whole("index") >= MILLION for row in rows)
    images: dict[int, EncodedImage] = {}
    by_index = {row.whole("index"): row for row in rows}
    examples = []
    for row in rows:
        index = row.whole("index")
        options = _options(row)
        right = row.text("answer", "")
        if right not in lettered(options):
            row.fault("answer", f"{right!r} is no option; the test split is published without answers")
        image = _image(row, by_index, images, data)
        turns = 1 if rotated else len(options)
        for turn in range(turns):
            position = (LETTERS.index(right) - turn) % len(options)
            number = index + turn * MILLION
            shown = options[turn:] + options[:turn]
            examples.append(_example(row, number, shown, LETTERS[position], image))
    return examples


def _options(row: Row) -> list[str]:
    options = []
    for letter in "ABCD":
        if not row.has(letter) or row.text(letter).lower() == "none":
            break
        options.append(row.text(letter))
    if len(options) < 2:
        row.fault("B", "fewer than two options")
    return options


def _image(row: Row, rows: dict[int, Row], known: dict[int, EncodedImage], data: Path) -> EncodedImage:
    """The row's image; VLMEvalKit writes an image once and then the index of the row that has it."""
    text = row.text("image")
    holder = row
    while len(text) <= 64 and text.isdecimal():
        index = int(text)
        if index not in rows or rows[index] is holder:
            row.fault("image", f"no row has the image of index {index}; is the file cut off?")
        holder = rows[index]
        text = holder.text("image")
        if holder is row:
            row.fault("image", "rows name each other's images in a circle")
    index = holder.whole("index")
    if index not in known:
        known[index] = from_base64(holder, "image", text, data, str(index))
    return known[index]


def _example(row: Row, number: int, options: list[str], answer: str, image: EncodedImage) -> Example:
    hint = row.text("hint", "")
    question = row.text("question")
    text = with_options(f"{hint}\n{question}" if hint else question, options)
    prompt = ask(
        str(number), row.text("category", "mmbench"), f"{text}\n{LETTER}", (image,), answer, image.path
    )
    facts = {
        "options": lettered(options),
        "group": str(number % MILLION),
        "rotation": number // MILLION,
    }
    return Example(prompt, (answer,), facts)
