"""MMBench's TSV with base64 images.

A file holds either the rotations of each question (indices above a million, as in VLMEvalKit's files) or only
the published questions; the reader then makes the rotations.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deepinsert.controller.metrics.contract import Example
from deepinsert.envs.prompts import EncodedImage

from .encoded_images import from_base64
from .question_prompts import LETTER, LETTERS, options_by_letter, question_prompt, with_options
from .records import Row, by_key, read_table

MILLION = 1_000_000
COLUMNS = ("index", "question", "A", "B", "answer", "image")
LONGEST_INDEX = 64
"""Characters; a longer text in the column of images is an image."""


def read_mmbench(data: Path, image_root: Path | None) -> list[Example]:
    """Read mmbench_dev_20230712.tsv or a similar file: every rotation of every question's options.

    Ids are the index, plus a million per further rotation. The image root is not used.
    """
    rows = list(by_key(read_table(data, "\t", COLUMNS), "index").values())
    has_rotations = any(row.whole("index") >= MILLION for row in rows)
    images: dict[int, EncodedImage] = {}
    row_of_index = {row.whole("index"): row for row in rows}
    examples = []
    for row in rows:
        index = row.whole("index")
        options = _options(row)
        right = row.text("answer", "")
        if right not in options_by_letter(options):
            row.fault("answer", f"{right!r} is no option; the test split is published without answers")
        image = _image(row, row_of_index, images, data)
        for turn in range(1 if has_rotations else len(options)):
            position = (LETTERS.index(right) - turn) % len(options)
            rotated = options[turn:] + options[:turn]
            examples.append(_example(row, index + turn * MILLION, rotated, LETTERS[position], image))
    return examples


def _options(row: Row) -> list[str]:
    """Return the options of a question, up to the first blank one."""
    options = []
    for letter in "ABCD":
        if not row.has(letter) or row.text(letter).lower() == "none":
            break
        options.append(row.text(letter))
    if len(options) < 2:
        row.fault("B", "the question has fewer than two options")
    return options


def _image(
    row: Row, row_of_index: Mapping[int, Row], images: dict[int, EncodedImage], data: Path
) -> EncodedImage:
    """Return the image of a row, and remember it in `images`.

    VLMEvalKit writes an image once, and in further rows the index of the row that has it.
    """
    text = row.text("image")
    holder = row
    while len(text) <= LONGEST_INDEX and text.isdecimal():
        index = int(text)
        if index not in row_of_index or row_of_index[index] is holder:
            row.fault("image", f"no row has the image of index {index}; is the file cut off?")
        holder = row_of_index[index]
        text = holder.text("image")
        if holder is row:
            row.fault("image", "rows name each other's images in a circle")
    index = holder.whole("index")
    if index not in images:
        images[index] = from_base64(holder, "image", text, data, str(index))
    return images[index]


def _example(row: Row, number: int, options: list[str], answer: str, image: EncodedImage) -> Example:
    """Return one rotation of a question.

    Args:
        row: the record of the question.
        number: the index of the rotation.
        options: the options in the order of the rotation.
        answer: the letter of the right option in this order.
        image: the image of the question.
    """
    hint = row.text("hint", "")
    question = row.text("question")
    text = with_options(f"{hint}\n{question}" if hint else question, options)
    prompt = question_prompt(
        str(number), row.text("category", "mmbench"), f"{text}\n{LETTER}", (image,), answer, image.path
    )
    facts = {
        "options": options_by_letter(options),
        "group": str(number % MILLION),
        "rotation": number // MILLION,
    }
    return Example(prompt, (answer,), facts)
