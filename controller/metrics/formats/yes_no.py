"""POPE's coco_pope_*.json, and MME's folders of images and questions."""

from __future__ import annotations

from pathlib import Path

from deepinsert.controller.metrics.contract import Example
from deepinsert.envs.data.media import DatasetError
from deepinsert.envs.prompts import ImageRef

from .question_prompts import SHORT_ANSWER, image_root_of, question_prompt
from .records import Row, by_key, read_jsonl, read_text

POPE_CATEGORIES = ("random", "popular", "adversarial")
PLEASE = " Please answer yes or no."
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png")


def read_pope(data: Path, image_root: Path | None) -> list[Example]:
    """Read coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json, or one of them.

    `data` may be the folder that holds all three, one of the files, or LLaVA's llava_pope_test.jsonl with the
    folder beside it (or as coco/). Ids are CATEGORY/NUMBER; LLaVA's file has its own. Images are in the image
    root, or in val2014/ below it.
    """
    root = image_root_of(data, image_root, "val2014")
    if data.name.startswith("llava_pope"):
        return _llava_pope(data, root)
    files = _pope_files(data) if data.is_dir() else [data]
    examples = []
    for path in files:
        category = path.stem.removeprefix("coco_pope_")
        for name, row in by_key(read_jsonl(path), "question_id").items():
            text = f"{row.text('text')}\n{SHORT_ANSWER}"
            examples.append(_pope(f"{category}/{name}", category, text, row, root))
    return examples


def _pope_files(folder: Path) -> list[Path]:
    """Return the files of all categories."""
    files = [folder / f"coco_pope_{category}.json" for category in POPE_CATEGORIES]
    for path in files:
        if not path.is_file():
            raise DatasetError(
                f"{folder}: there is no {path.name}; POPE's score is the mean over "
                f"{', '.join(POPE_CATEGORIES)} (give one file to score it alone)"
            )
    return files


def _llava_pope(data: Path, root: Path) -> list[Example]:
    """Read LLaVA's file, which numbers questions through all categories.

    The questions of each category are in the order of the category's own file.
    """
    folder = data.parent / "coco" if (data.parent / "coco").is_dir() else data.parent
    truth = {path.stem.removeprefix("coco_pope_"): read_jsonl(path) for path in _pope_files(folder)}
    next_row = dict.fromkeys(truth, 0)
    examples = []
    for name, question in by_key(read_jsonl(data), "question_id").items():
        category = question.text("category")
        rows = truth.get(category, [])
        if next_row.get(category, 0) >= len(rows):
            question.fault("category", f"coco_pope_{category}.json has only {len(rows)} questions")
        row = rows[next_row[category]]
        next_row[category] += 1
        text = question.text("text")
        if row.text("image") != question.text("image") or not text.startswith(row.text("text")):
            question.fault("text", f"it is not the question of {row.origin}; are both files of one version?")
        examples.append(_pope(name, category, text, row, root))
    return examples


def _pope(name: str, category: str, text: str, row: Row, root: Path) -> Example:
    """Return one question.

    Args:
        name: the id of the example.
        category: POPE's category.
        text: the text that the model receives.
        row: the published record.
        root: the folder of the images.
    """
    label = row.text("label").lower()
    if label not in ("yes", "no"):
        row.fault("label", f'"yes" or "no" is expected, not {label!r}')
    image = row.text("image")
    prompt = question_prompt(name, category, text, (ImageRef(root, image, row.origin),), label, image)
    return Example(prompt, (label,))


def read_mme(data: Path, image_root: Path | None) -> list[Example]:
    """Read MME_Benchmark_release_version: one folder per category, with one text file per image.

    A text file holds two questions, "QUESTION<tab>Yes". Texts and images are side by side, or in
    questions_answers_YN/ and images/. Ids are CATEGORY/IMAGE#1 and #2.
    """
    if not data.is_dir():
        raise DatasetError(f"{data}: give the folder that holds MME's categories (artwork, color, ...)")
    root = image_root_of(data, image_root)
    examples = []
    for category in sorted(path for path in data.iterdir() if path.is_dir()):
        inner = category / "questions_answers_YN"
        for path in sorted((inner if inner.is_dir() else category).glob("*.txt")):
            examples += _mme(path, category.name, root)
    if not examples:
        raise DatasetError(
            f"{data}: there is no CATEGORY/*.txt; give the folder MME_Benchmark_release_version"
        )
    return examples


def _mme(path: Path, category: str, root: Path) -> list[Example]:
    """Return the two questions of a text file."""
    image = _mme_image(path, root / category, category)
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    if len(lines) != 2:
        raise DatasetError(f"{path}: the file has {len(lines)} questions; MME asks two about each image")
    examples = []
    for number, line in enumerate(lines, 1):
        question, tab, answer = line.strip().rpartition("\t")
        answer = answer.strip().rstrip(".").lower()
        if not tab or answer not in ("yes", "no"):
            raise DatasetError(f'{path}, line {number}: a question, a tab and "Yes" or "No" are expected')
        question = question.strip().removesuffix(PLEASE.strip()).strip()
        key = f"{category}/{Path(image).name}"
        images = (ImageRef(root, image, f"{path}, line {number}"),)
        prompt = question_prompt(
            f"{key}#{number}", category, f"{question}\n{SHORT_ANSWER}", images, answer, key
        )
        name_in_answers = (f"{category}/{path.stem}", question.lower())
        examples.append(Example(prompt, (answer,), {"image_and_question": name_in_answers}))
    return examples


def _mme_image(path: Path, folder: Path, category: str) -> str:
    """Return the path, below the image root, of the image that a text file asks about."""
    for inner in ("images/", ""):
        for extension in IMAGE_EXTENSIONS:
            if (folder / f"{inner}{path.stem}{extension}").is_file():
                return f"{category}/{inner}{path.stem}{extension}"
    # Answers can be scored without images; opening the missing image raises an error that names it.
    return f"{category}/{path.stem}.jpg"
