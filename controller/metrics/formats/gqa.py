"""GQA's testdev_balanced_questions.json, and LLaVA's question file beside it."""

from __future__ import annotations

from pathlib import Path

from deepinsert.controller.metrics.contract import Example
from deepinsert.envs.data.media import DatasetError
from deepinsert.envs.prompts import ImageRef

from .question_prompts import SHORT_ANSWER, image_root_of, question_prompt
from .records import Row, by_key, file_beside, read_jsonl, read_record


def read_gqa(data: Path, image_root: Path | None) -> list[Example]:
    """Read the questions; images are images/IMAGE_ID.jpg.

    LLaVA's llava_gqa_testdev_balanced.jsonl selects and words the questions; the answers are in GQA's file
    beside it.
    """
    if data.suffix == ".jsonl":
        names = ("testdev_balanced_questions.json", "data/testdev_balanced_questions.json")
        published = file_beside(data, names, "the answers")
        truth = read_record(published)
        questions = by_key(read_jsonl(data), "question_id").values()
        rows = [(row.text("question_id"), row.text("text"), row) for row in questions]
    else:
        published, truth = data, read_record(data)
        rows = [(name, "", truth) for name in truth.values]
    if not rows:
        raise DatasetError(f"{data}: there is no question in it; is the file cut off?")
    root = image_root_of(data, image_root, "images", "data/images")
    return [_example(truth, name, text, row, published, root) for name, text, row in rows]


def _example(truth: Row, name: str, text: str, question: Row, published: Path, root: Path) -> Example:
    """Return one question.

    Args:
        truth: all published questions by id.
        name: the id of the question.
        text: LLaVA's wording, or an empty text.
        question: the record that names the question, for messages.
        published: the file of `truth`, for messages.
        root: the folder of the images.
    """
    if name not in truth.values:
        question.fault("question_id", f"{published.name} has no question {name!r}")
    row = Row(truth.values[name], f"{published}, question {name!r}")
    answer = row.text("answer")
    image_id = row.text("imageId")
    types = row.values.get("types")
    image = ImageRef(root, f"{image_id}.jpg", row.origin)
    prompt = question_prompt(
        name, "gqa", text or f"{row.text('question')}\n{SHORT_ANSWER}", (image,), answer, image_id
    )
    kind = types.get("structural", "other") if isinstance(types, dict) else "other"
    return Example(prompt, (answer,), {"type": str(kind)})
