"""ScienceQA's problems.json with pid_splits.json, and LLaVA's question file beside them.

The reader returns only questions with an image, which are those that "ScienceQA-IMG" counts.
"""

from __future__ import annotations

from pathlib import Path

from deepinsert.controller.metrics.contract import Example
from deepinsert.envs.data.media import DatasetError
from deepinsert.envs.prompts import ImageRef

from .question_prompts import (
    LETTER,
    LETTERS,
    image_root_of,
    options_by_letter,
    question_prompt,
    with_options,
)
from .records import Row, file_beside, json_rows, read_record

SPLIT = "test"


def read_scienceqa(data: Path, image_root: Path | None) -> list[Example]:
    """Read problems.json (test split), or LLaVA's llava_test_CQM-A.json beside it.

    Images are test/ID/image.png below the image root, or below its folder images/.
    """
    root = image_root_of(data, image_root, "images/test", "test")
    if data.name.startswith("llava_"):
        problems = read_record(file_beside(data, ("problems.json",), "the answers"))
        examples = [_example_of_llava(row, problems, root) for row in json_rows(data) if row.has("image")]
    else:
        problems = read_record(data)
        splits = read_record(file_beside(data, ("pid_splits.json",), "the ids of the test split"))
        names = [name for name in splits.texts(SPLIT) if _problem(problems, name).has("image")]
        examples = [_published_example(problems, name, root) for name in names]
    if not examples:
        raise DatasetError(f"{data}: no question of the {SPLIT} split has an image; is it the right file?")
    return examples


def without_image(answer: Row) -> bool:
    """Return whether LLaVA answered a question without an image; its file of answers holds these too."""
    return answer.has("prompt") and "<image>" not in answer.text("prompt")


def _problem(problems: Row, name: str) -> Row:
    """Return the problem with this id."""
    if name not in problems.values:
        raise DatasetError(f"{problems.origin}: there is no problem {name!r}; do both files belong together?")
    return Row(problems.values[name], f"{problems.origin}, problem {name!r}")


def _published_example(problems: Row, name: str, root: Path) -> Example:
    """Return a question in LLaVA's wording, made from the published problem."""
    row = _problem(problems, name)
    hint = row.text("hint", "")
    context = f"Context: {hint}\n" if hint else ""
    text = f"{context}{with_options(row.text('question'), row.texts('choices'))}\n{LETTER}"
    return _example(row, name, text, f"{name}/{row.text('image')}", root)


def _example_of_llava(question: Row, problems: Row, root: Path) -> Example:
    """Return a question as LLaVA's file words it."""
    turns = question.rows("conversations")
    if not turns:
        question.fault("conversations", "the record has no question")
    words = turns[0].text("value").replace("<image>", "").strip()
    name = question.text("id")
    return _example(_problem(problems, name), name, f"{words}\n{LETTER}", question.text("image"), root)


def _example(row: Row, name: str, text: str, image: str, root: Path) -> Example:
    """Return one question.

    Args:
        row: the published problem.
        name: its id.
        text: the text that the model receives.
        image: the path of the image below `root`.
        root: the folder of the images.
    """
    options = options_by_letter(row.texts("choices"))
    position = row.whole("answer")
    if not 0 <= position < len(options):
        row.fault("answer", f"{position} is none of the {len(options)} choices")
    answer = LETTERS[position]
    subject = row.text("subject", "scienceqa")
    prompt = question_prompt(name, subject, text, (ImageRef(root, image, row.origin),), answer, image)
    return Example(prompt, (answer,), {"options": options})
