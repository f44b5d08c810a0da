"""What a benchmark consists of: questions with their references, and a rule that turns answers into a score.

A new benchmark needs a reader that returns `Example`s and a rule that returns a `Score`.
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
    """One question as a model receives it, with what its benchmark holds about the right answer."""

    prompt: Prompt
    """Its id is unique and its source is the benchmark's category. A loss is taken on its answer, unless the
    answer is empty."""
    references: tuple[str, ...]
    """The right answers, as the benchmark publishes them."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the rule needs, such as options, category or group. Examples of one "group" (the rotations of
    an MMBench question) are one question and share its score."""


@dataclass(frozen=True)
class Score:
    """The score of answers: the benchmark's headline number, the score of each example, and details."""

    headline: float
    """The benchmark's own number, in percent where it is a share."""
    unit: str
    """What the headline is: "accuracy", "F1", "mAP", "CIDEr"."""
    items: NDArray[np.float64] | None
    """The score of each example (P), in [0, 1]; None if the rule is not per question (mAP, BLEU)."""
    details: dict[str, float] = field(default_factory=dict)
    """The benchmark's other numbers, such as those per category, precision and recall."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark with the reader of its published files and its published rule."""

    name: str
    source: str
    """The evaluation script or paper that the rule follows."""
    read: Callable[[Path, Path | None], list[Example]]
    """Reads the examples of the data at a path. The second argument is the folder of the images; None means
    the folder in which the benchmark publishes them."""
    score: Callable[..., Score]
    """Scores one answer per example, in the same order: `score(answers, examples)`."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Choices that the numbers depend on, such as the embedder; they are reported beside the score."""
    promptable: bool = True
    """Whether commands can put its questions to a model. Otherwise only answers made elsewhere are scored."""
    ignores_record: Callable[[Any], bool] | None = None
    """Whether a record (`formats.records.Row`) of answers belongs to a question that does not count."""
    score_without_details: Callable[..., Score] | None = None
    """Computes the score without its details, if these take long."""

    def headline(self, answers: Sequence[str], examples: Sequence[Example]) -> float:
        """Return the headline of the score, without computing the details where they can be left out."""
        return float((self.score_without_details or self.score)(answers, examples).headline)


def mean_score(
    items: Sequence[float] | NDArray[np.float64], categories: Sequence[str] | None = None
) -> Score:
    """Return the accuracy in percent over all items (P); the details hold that of each category (P)."""
    scores = np.asarray(items, dtype=np.float64)
    details = {}
    if categories is not None:
        names = np.array(categories)
        details = {name: 100 * float(scores[names == name].mean()) for name in dict.fromkeys(categories)}
    return Score(100 * float(scores.mean()), "accuracy", scores, details)
