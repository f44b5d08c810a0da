"""AI2D as published (questions/*.json with images) and as one Parquet table, the way lmms-lab hosts it."""

from __future__ import annotations

from pathlib import Path

from deepinsert.controller.metrics.contract import Example
from deepinsert.envs.data.media import DatasetError
from deepinsert.envs.prompts import ImageRef

from .encoded_images import from_struct
from .question_prompts import LETTER, LETTERS, ask, lettered, root_of, with_options
from .records import Row, parquet_files, read_parquet, read_record, read_text

TEST_IDS = "ai2d_test_ids.csv"


def read_ai2d(data: Path, image_root: Path | None) -> list[Example]:
    """Examples of the folder ai2d/ with questions/, images/ and ai2d_test_ids.csv, or of test-*.parquet.

    Questions about labels ("What does the letter A represent?") are about abc_images/ where that folder is.
    """
    if data.suffix == ".parquet" or (data.is_dir() and not (data / "questions").is_dir()):
        return [
            example
            for path in parquet_files(data, "test")
            for example in _table(path)
        ]  # fmt: skip
    if not data.is_dir():
        raise DatasetError(f"{data}: give the folder that holds questions/, or test-*.parquet")
    root = root_of(data, image_root)
    ids = data / TEST_IDS
    if not ids.is_file():
        raise DatasetError(f"{data}: no {TEST_IDS} there, which says what belongs to the test split")
    examples = []
    for name in read_text(ids).split():
        path = data / "questions" / f"{Path(name).name}.png.json"
        if path.is_file():  # some images have no question
            examples += _diagram(path, root)
    if not examples:
        raise DatasetError(f"{data}: no question of the images in {TEST_IDS}")
    return examples


def _diagram(path: Path, root: Path) -> list[Example]:
    record = read_record(path)
    image = record.text("imageName")
    questions = record.values.get("questions")
    if not isinstance(questions, dict):
        record.fault("questions", "questions by their text are expected")
    examples = []
    for text, values in questions.items():
        row = Row(values, f"{path}, question {text!r}")
        folder = "abc_images" if values.get("abcLabel") and (root / "abc_images").is_dir() else "images"
        images = (ImageRef(root, f"{folder}/{image}", row.where),)
        examples.append(
            _example(row.text("questionId"), text, row, "answerTexts", "correctAnswer", images, image)
        )
    return examples


def _table(path: Path) -> list[Example]:
    rows = read_parquet(path, ("question", "options", "answer", "image"))
    return [
        _example(
            f"{path.stem}#{index}", row.text("question"), row, "options", "answer",
            (from_struct(row, "image", path, str(index)),), f"{path.name}#{index}",
        )
        for index, row in enumerate(rows)
    ]  # fmt: skip


def _example(name: str, text: str, row: Row, choices: str, right: str, images: tuple, key: str) -> Example:
    options = lettered(row.texts(choices))
    position = row.whole(right)
    if not 0 <= position < len(options):
        row.fault(right, f"{position} is none of the {len(options)} options")
    answer = LETTERS[position]
    words = f"{with_options(text, list(options.values()))}\n{LETTER}"
    return Example(ask(name, "ai2d", words, images, answer, key), (answer,), {"options": options})
