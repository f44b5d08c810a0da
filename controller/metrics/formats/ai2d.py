"""AI2D as published (questions/*.json with images), and as the Parquet table that lmms-lab hosts."""

from __future__ import annotations

from pathlib import Path

from deepinsert.controller.metrics.contract import Example
from deepinsert.envs.data.media import DatasetError
from deepinsert.envs.prompts import ImageRef

from .encoded_images import from_struct
from .question_prompts import (
    LETTER,
    LETTERS,
    image_root_of,
    options_by_letter,
    question_prompt,
    with_options,
)
from .records import Row, parquet_files, read_parquet, read_record, read_text

TEST_IDS = "ai2d_test_ids.csv"


def read_ai2d(data: Path, image_root: Path | None) -> list[Example]:
    """Read the folder ai2d/ with questions/, images/ and ai2d_test_ids.csv, or test-*.parquet.

    Questions about labels ("What does the letter A represent?") show the image in abc_images/ if that folder
    exists.
    """
    if data.suffix == ".parquet" or (data.is_dir() and not (data / "questions").is_dir()):
        return [example for path in parquet_files(data, "test") for example in _table(path)]
    if not data.is_dir():
        raise DatasetError(f"{data}: give the folder that holds questions/, or test-*.parquet")
    root = image_root_of(data, image_root)
    ids = data / TEST_IDS
    if not ids.is_file():
        raise DatasetError(f"{data}: there is no {TEST_IDS}, which lists the test split")
    examples = []
    for name in read_text(ids).split():
        path = data / "questions" / f"{Path(name).name}.png.json"
        if path.is_file():  # some images have no question
            examples += _diagram(path, root)
    if not examples:
        raise DatasetError(f"{data}: there is no question about the images in {TEST_IDS}")
    return examples


def _diagram(path: Path, root: Path) -> list[Example]:
    """Read the questions about one diagram."""
    record = read_record(path)
    image = record.text("imageName")
    questions = record.values.get("questions")
    if not isinstance(questions, dict):
        record.fault("questions", "questions by their text are expected")
    examples = []
    for text, values in questions.items():
        row = Row(values, f"{path}, question {text!r}")
        folder = "abc_images" if values.get("abcLabel") and (root / "abc_images").is_dir() else "images"
        reference = ImageRef(root, f"{folder}/{image}", row.origin)
        examples.append(
            _example(row, row.text("questionId"), text, "answerTexts", "correctAnswer", reference, image)
        )
    return examples


def _table(path: Path) -> list[Example]:
    """Read the questions of one Parquet file."""
    examples = []
    for index, row in enumerate(read_parquet(path, ("question", "options", "answer", "image"))):
        image = from_struct(row, "image", path, str(index))
        name, key = f"{path.stem}#{index}", f"{path.name}#{index}"
        examples.append(_example(row, name, row.text("question"), "options", "answer", image, key))
    return examples


def _example(
    row: Row, name: str, question: str, options_field: str, answer_field: str, image: ImageRef, image_key: str
) -> Example:
    """Return a question whose record holds the options and the position of the right one in two fields."""
    options = options_by_letter(row.texts(options_field))
    position = row.whole(answer_field)
    if not 0 <= position < len(options):
        row.fault(answer_field, f"{position} is none of the {len(options)} options")
    answer = LETTERS[position]
    text = f"{with_options(question, list(options.values()))}\n{LETTER}"
    prompt = question_prompt(name, "ai2d", text, (image,), answer, image_key)
    return Example(prompt, (answer,), {"options": options})
