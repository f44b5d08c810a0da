"""ScienceQA's problems.json with pid_splits.json, and LLaVA's question file beside them.

Only questions with an image are read: they are what "ScienceQA-IMG" counts.
"""

from __future__ import annotations

from pathlib import Path

from deepinsert.controller.metrics.contract import Example
from deepinsert.envs.data.media import DatasetError
from deepinsert.envs.prompts import ImageRef

from .question_prompts import LETTER, LETTERS, ask, lettered, root_of, with_options
from .records import Row, beside, json_rows, read_record

SPLIT = "test"


def read_scienceqa(data: Path, image_root: Path | None) -> list[Example]:
    """Examples of problems.json (test split), or of LLaVA's llava_test_CQM-A.json beside that.

    Images are test/ID/image.png below the image root, or below images/ there.
    """
    root = root_of(data, image_root, "images/test", "test")
    if data.name.startswith("llava_"):
        problems = read_record(beside(data, ("problems.json",), "the answers"))
        examples = [_asked_by_llava(row, problems, root) for row in json_rows(data) if row.has("image")]
    else:
        problems = read_record(data)
        splits = read_record(beside(data, ("pid_splits.json",), "the ids of the test split"))
        names = [name for name in splits.texts(SPLIT) if _problem(problems, name).has("image")]
        examples = [_published(problems, name, root) for name in names]
    if not examples:
        raise DatasetError(f"{data}: no question of the {SPLIT} split has an image; is it the right file?")
    return examples


def without_image(answer: Row) -> bool:
    """Whether LLaVA was asked this question without an image: its file of answers holds those too."""
    return answer.has("prompt") and "<image>" not in answer.text("prompt")


def _problem(problems: Row, name: str) -> Row:
    if name not in problems.values:
        raise DatasetError(f"{problems.where}: no problem {name!r}; do both files belong together?")
    return Row(problems.values[name], f"{problems.where}, problem {name!r}")


def _published(problems: Row, name: str, root: Path) -> Example:
    row = _problem(problems, name)
    hint = row.text("hint", "")
    context = f"Context: {hint}\n" if hint else ""
    text = f"{context}{with_options(row.text('question'), row.texts('choices'))}\n{LETTER}"
    return _example(row, name, text, f"{name}/{row.text('image')}", root)


def _asked_by_llava(asked: Row, problems: Row, root: Path) -> Example:
    said = asked.rows("conversations")
    if not said:
        asked.fault("conversations", "no question")
    words = said[0].text("value").replace("<image>", "").strip()
    name = asked.text("id")
    return _example(_problem(problems, name), name, f"{words}\n{LETTER}", asked.text("image"), root)


def _example(row: Row, name: str, text: str, image: str, root: Path) -> Example:
    options = lettered(row.texts("choices"))
    position = row.whole("answer")
    if not 0 <= position < len(options):
        row.fault("answer", f"{position} is none of the {len(options)} choices")
    answer = LETTERS[position]
    subject = row.text("subject", "scienceqa")
    prompt = ask(name, subject, text, (ImageRef(root, image, row.where),), answer, image)
    return Example(prompt, (answer,), {"options": options})
