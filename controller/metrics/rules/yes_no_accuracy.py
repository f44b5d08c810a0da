"""POPE and MME: questions to be answered by yes or no.

POPE follows llava/eval/eval_pope.py of LLaVA (that of github.com/AoiDragon/POPE says the same), MME
calculation.py of its eval_tool.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deepinsert.controller.metrics.contract import Benchmark, Example, Score
from deepinsert.controller.metrics.formats.yes_no import read_mme, read_pope

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def says_no(answer: str) -> bool:
    """Whether the first sentence has the word "No", "no" or "not" (in these spellings); all else is a yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return any(word in words for word in ("No", "not", "no"))


def score_pope(answers: Sequence[str], examples: Sequence[Example]) -> Score:
    """Mean over the categories of the F1 of "yes"; in the details what each category reports, in percent."""
    said = np.array([not says_no(answer) for answer in answers])
    true = np.array([example.references[0] == "yes" for example in examples])
    categories = np.array([example.prompt.source for example in examples])
    details, f1 = {}, []
    for name in dict.fromkeys(categories.tolist()):
        found = confusion(said[categories == name], true[categories == name])
        details.update({f"{name}/{key}": value for key, value in found.items()})
        f1.append(found["F1"])
    return Score(float(np.mean(f1)), "F1", (said == true).astype(np.float64), details)


def confusion(said: NDArray[np.bool_], true: NDArray[np.bool_]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of "yes", and the share of answers that are "yes"; in percent.

    What would divide by zero is 0: a model that never says yes has a precision and an F1 of 0.
    """
    hits = float((said & true).sum())
    precision = hits / max(float(said.sum()), 1.0)
    recall = hits / max(float(true.sum()), 1.0)
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    accuracy = float((said == true).mean())
    shares = {"accuracy": accuracy, "precision": precision, "recall": recall, "F1": f1}
    return {key: 100 * value for key, value in {**shares, "yes-ratio": float(said.mean())}.items()}


def mme_answer(answer: str) -> str:
    """ "yes", "no" or "other": the whole answer without points, or what is in its first four characters."""
    text = answer.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def score_mme(answers: Sequence[str], examples: Sequence[Example]) -> Score:
    """Sum over perception's categories of accuracy and accuracy+ (both questions of an image right), each in
    percent: at most 2,000. In the details every category, and the sums of perception and cognition.

    A file of other categories only, as a part of the benchmark, is summed over all of them.
    """
    items = np.array(
        [
            mme_answer(answer) == example.references[0]
            for answer, example in zip(answers, examples, strict=True)
        ],
        dtype=np.float64,
    )
    pairs: dict[str, dict[str, list[float]]] = {}
    for earned, example in zip(items.tolist(), examples, strict=True):
        category = pairs.setdefault(example.prompt.source, {})
        category.setdefault(example.prompt.image_key, []).append(earned)
    details = {}
    for name, images in pairs.items():
        accuracy = np.concatenate(list(images.values())).mean()
        both = np.mean([all(earned) for earned in images.values()])
        details[name] = 100 * float(accuracy + both)
    for group, names in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if there := [details[name] for name in names if name in details]:
            details[group] = sum(there)
    everything = sum(details[name] for name in pairs)
    return Score(details.get("perception", everything), "perception score", items, details)


BENCHMARKS = (
    Benchmark("pope", "github.com/haotian-liu/LLaVA: llava/eval/eval_pope.py", read_pope, score_pope),
    Benchmark(
        "mme",
        "github.com/BradyFU/Awesome-Multimodal-Large-Language-Models: eval_tool/calculation.py",
        read_mme,
        score_mme,
    ),
)
