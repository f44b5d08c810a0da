"""POPE's coco_pope_*.json and MME's folders of images and questions."""

from __future__ import annotations

from pathlib import Path

from deepinsert.controller.metrics.contract import Example
from deepinsert.envs.data.media import DatasetError
from deepinsert.envs.prompts import ImageRef

from .question_prompts import SHORT_ANSWER, ask, root_of
from .records import Row, by_key, read_jsonl, read_text

POPE_CATEGORIES = ("random", "popular", "adversarial")
PLEASE = " Please answer yes or no."
PICTURES = (".jpg", ".jpeg", ".png")


def read_pope(data: Path, image_root: Path | None) -> list[Example]:
    """Examples of a folder with coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json,
    or of one of them, or of LLaVA's llava_pope_test.jsonl with that folder beside it (or as coco/).

    Ids are CATEGORY/NUMBER, LLaVA's file has its own. Images lie in the image root, or in val2014/ there.
    """
    root = root_of(data, image_root, "val2014")
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
    files = [folder / f"coco_pope_{category}.json" for category in POPE_CATEGORIES]
    for path in files:
        if not path.is_file():
            raise DatasetError(
                f"{folder}: no {path.name} there; POPE's score is the mean over "
                f"{', '.join(POPE_CATEGORIES)} (give one file to score it alone)"
            )
    return files


def _llava_pope(data: Path, root: Path) -> list[Example]:
    """LLaVA's numbers questions through all categories; each category's are in the order of its own file."""
    folder = data.parent / "coco" if (data.parent / "coco").is_dir() else data.parent
    truth = {path.stem.removeprefix("coco_pope_"): read_jsonl(path) for path in _pope_files(folder)}
    taken = dict.fromkeys(truth, 0)
    examples = []
    for name, asked in by_key(read_jsonl(data), "question_id").items():
        category = asked.text("category")
        rows = truth.get(category, [])
        if taken.get(category, 0) >= len(rows):
            asked.fault("category", f"coco_pope_{category}.json has only {len(rows)} questions")
        row = rows[taken[category]]
        taken[category] += 1
        if row.text("image") != asked.text("image") or not asked.text("text").startswith(row.text("text")):
            asked.fault("text", f"it is not the question of {row.where}; are both files of one version?")
        examples.append(_pope(name, category, asked.text("text"), row, root))
    return examples


def _pope(name: str, category: str, text: str, row: Row, root: Path) -> Example:
    label = row.text("label").lower()
    if label not in ("yes", "no"):
        row.fault("label", f'"yes" or "no" is expected, not {label!r}')
    image = row.text("image")
    return Example(ask(name, category, text, (ImageRef(root, image, row.where),), label, image), (label,))


def read_mme(data: Path, image_root: Path | None) -> list[Example]:
    """Examples of MME_Benchmark_release_version: a folder for each category, with a text file of two
    questions ("QUESTION<tab>Yes") for each image, both side by side or in questions_answers_YN/ and images/.

    Ids are CATEGORY/IMAGE#1 and #2.
    """
    if not data.is_dir():
        raise DatasetError(f"{data}: give the folder that holds MME's categories (artwork, color, ...)")
    root = root_of(data, image_root)
    examples = []
    for category in sorted(path for path in data.iterdir() if path.is_dir()):
        inner = category / "questions_answers_YN"
        for path in sorted((inner if inner.is_dir() else category).glob("*.txt")):
            examples += _mme(path, category.name, root)
    if not examples:
        raise DatasetError(f"{data}: no CATEGORY/*.txt there; give the folder MME_Benchmark_release_version")
    return examples


def _mme(path: Path, category: str, root: Path) -> list[Example]:
    picture = _picture(path, root / category, category)
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    if len(lines) != 2:
        raise DatasetError(f"{path}: {len(lines)} questions; MME asks two of each image")
    examples = []
    for number, line in enumerate(lines, 1):
        question, tab, answer = line.strip().rpartition("\t")
        answer = answer.strip().rstrip(".").lower()
        if not tab or answer not in ("yes", "no"):
            raise DatasetError(f'{path}, line {number}: a question, a tab and "Yes" or "No" are expected')
        bare = question.strip().removesuffix(PLEASE.strip()).strip()
        where = f"{path}, line {number}"
        name = f"{category}/{Path(picture).name}"
        images = (ImageRef(root, picture, where),)
        prompt = ask(f"{name}#{number}", category, f"{bare}\n{SHORT_ANSWER}", images, answer, name)
        asked = (f"{category}/{path.stem}", bare.lower())
        examples.append(Example(prompt, (answer,), {"asked_as": asked}))
    return examples


def _picture(path: Path, folder: Path, category: str) -> str:
    """Path below the image root of the image that a text file is about."""
    for inner in ("images/", ""):
        for ending in PICTURES:
            if (folder / f"{inner}{path.stem}{ending}").is_file():
                return f"{category}/{inner}{path.stem}{ending}"
    # Answers can be scored without images; opening one will say what is missing.
    return f"{category}/{path.stem}.jpg"
