"""GQA's testdev_balanced_questions.json, and LLaVA's question file beside it."""

from __future__ import annotations

from pathlib import Path

from deepinsert.controller.metrics.contract import Example
from deepinsert.envs.data.media import DatasetError
from deepinsert.envs.prompts import ImageRef

from .question_prompts import SHORT_ANSWER, ask, root_of
from .records import Row, beside, by_key, read_jsonl, read_record


def read_gqa(data: Path, image_root: Path | None) -> list[Example]:
    """Examples of the questions, images are images/IMAGE_ID.jpg.

    LLaVA's llava_gqa_testdev_balanced.jsonl chooses and words the questions; the answers lie beside it.
    """
    if data.suffix == ".jsonl":
        asked = list(by_key(read_jsonl(data), "question_id").values())
        published = beside(
            data, ("testdev_balanced_questions.json", "data/testdev_balanced_questions.json"), "the answers"
        )
        truth = read_record(published)
        rows = [(row.text("question_id"), row.text("text"), row) for row in asked]
    else:
        published, truth = data, read_record(data)
        rows = [(name, "", truth) for name in truth.values]
    if not rows:
        raise DatasetError(f"{data}: no question in it; is the file cut off?")
    root = root_of(data, image_root, "images", "data/images")
    return [_example(truth, name, text, row, published, root) for name, text, row in rows]


def _example(truth: Row, name: str, text: str, asked: Row, published: Path, root: Path) -> Example:
    if name not in truth.values:
        asked.fault("question_id", f"{published.name} has no question {name!r}")
    row = Row(truth.values[name], f"{published}, question {name!r}")
    answer = row.text("answer")
    image = row.text("imageId")
    types = row.values.get("types")
    images = (ImageRef(root, f"{image}.jpg", row.where),)
    words = text or f"{row.text('question')}\n{SHORT_ANSWER}"
    prompt = ask(name, "gqa", words, images, answer, image)
    kind = types.get("structural", "other") if isinstance(types, dict) else "other"
    return Example(prompt, (answer,), {"type": str(kind)})
