"""POPE and MME: questions whose answer is yes or no.

POPE follows llava/eval/eval_pope.py of LLaVA (the script of github.com/AoiDragon/POPE computes the same), and
MME follows calculation.py of its eval_tool.
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
    """Return whether the first sentence has the word "No", "no" or "not"; any other answer means yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return any(word in words for word in ("No", "not", "no"))


def score_pope(answers: Sequence[str], examples: Sequence[Example]) -> Score:
    """Return the mean over the categories of the F1 of "yes", in percent; the details hold each category."""
    predicted = np.array([not says_no(answer) for answer in answers])
    true = np.array([example.references[0] == "yes" for example in examples])
    categories = np.array([example.prompt.source for example in examples])
    details, f1 = {}, []
    for name in dict.fromkeys(categories.tolist()):
        shares = confusion(predicted[categories == name], true[categories == name])
        details.update({f"{name}/{key}": value for key, value in shares.items()})
        f1.append(shares["F1"])
    return Score(float(np.mean(f1)), "F1", (predicted == true).astype(np.float64), details)


def confusion(predicted: NDArray[np.bool_], true: NDArray[np.bool_]) -> dict[str, float]:
    """Return accuracy, precision, recall and F1 of "yes", and the share of "yes" among answers, in percent.

    A share that would divide by zero is 0: a model that never answers yes has a precision and an F1 of 0.
    """
    hits = float((predicted & true).sum())
    precision = hits / max(float(predicted.sum()), 1.0)
    recall = hits / max(float(true.sum()), 1.0)
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    accuracy = float((predicted == true).mean())
    shares = {"accuracy": accuracy, "precision": precision, "recall": recall, "F1": f1}
    return {key: 100 * value for key, value in {**shares, "yes-ratio": float(predicted.mean())}.items()}


def mme_answer(answer: str) -> str:
    """Return "yes", "no" or "other" by the first four characters of the answer without points.

    An answer of one letter, "y" or "n", counts too.
    """
    text = answer.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def score_mme(answers: Sequence[str], examples: Sequence[Example]) -> Score:
    """Return the sum over perception's categories of accuracy and accuracy+, in percent: at most 2,000.

    Accuracy+ is the share of images whose two questions are both answered right. The details hold every
    category and the sums of perception and cognition. If the data has no category of perception, the score is
    the sum over all its categories.
    """
    items = np.array(
        [
            mme_answer(answer) == example.references[0]
            for answer, example in zip(answers, examples, strict=True)
        ],
        dtype=np.float64,
    )
    pairs: dict[str, dict[str, list[float]]] = {}
    for item, example in zip(items.tolist(), examples, strict=True):
        category = pairs.setdefault(example.prompt.source, {})
        category.setdefault(example.prompt.image_key, []).append(item)
    details = {}
    for name, images in pairs.items():
        accuracy = np.concatenate(list(images.values())).mean()
        both = np.mean([all(pair) for pair in images.values()])
        details[name] = 100 * float(accuracy + both)
    for group, names in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if scores := [details[name] for name in names if name in details]:
            details[group] = sum(scores)
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
