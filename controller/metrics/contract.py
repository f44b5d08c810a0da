"""What a benchmark is: questions with what counts as right, and the rule that turns answers into a score.

Whoever adds a benchmark writes a reader that gives `Example`s and a rule that gives a `Score`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepinsert.envs.prompts import Prompt


@dataclass(frozen=True)
class Example:
    """One question as a model is asked it, and what its benchmark knows about the right answer."""

    prompt: Prompt
    """Its id is unique, its source the benchmark's category; its answer is what a loss is taken on, or ""."""
    references: tuple[str, ...]
    """What counts as right, as the benchmark publishes it."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the rule needs beside: options, category, group. Examples of one "group" (the rotations of an
    MMBench question) are one question and earn together."""


@dataclass(frozen=True)
class Score:
    """What answers earned."""

    headline: float
    """The benchmark's own number, in percent where it is a share."""
    unit: str
    """What the headline is: "accuracy", "F1", "mAP", "CIDEr"."""
    items: NDArray[np.float64] | None
    """What each example earned (P), in [0, 1]; None where the rule is not per question (mAP, BLEU)."""
    details: dict[str, float] = field(default_factory=dict)
    """Whatever else the benchmark reports: categories, precision, recall."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark by its published files and its published rule."""

    name: str
    source: str
    """Where the rule comes from: the evaluation script or paper that it follows."""
    read: Callable[[Path, Path | None], list[Example]]
    """Examples of the data at a path, images below a root (None: where the benchmark keeps them)."""
    score: Callable[..., Score]
    """The score of one answer for each example, in their order: `score(answers, examples)`."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Choices that the numbers depend on, such as the embedder; they belong beside the score."""
    askable: bool = True
    """Whether the commands can put its questions to a model; else answers made elsewhere are scored."""
    passed_over: Callable[[Any], bool] | None = None
    """Whether a record (`formats.records.Row`) of answers is about a question that does not count."""
    brief: Callable[..., Score] | None = None
    """The same score without its details, where those take long."""

    def headline(self, answers: Sequence[str], examples: Sequence[Example]) -> float:
        """The score's headline, for which no details are worked out where they can be left."""
        return float((self.brief or self.score)(answers, examples).headline)


def mean_score(
    items: Sequence[float] | NDArray[np.float64], categories: Sequence[str] | None = None
) -> Score:
    """Accuracy in percent over all items (P), and in the details over those of each category (P)."""
    earned = np.asarray(items, dtype=np.float64)
    details = {}
    if categories is not None:
        names = np.array(categories)
        details = {name: 100 * float(earned[names == name].mean()) for name in dict.fromkeys(categories)}
    return Score(100 * float(earned.mean()), "accuracy", earned, details)
