"""A benchmark's score in bootstrap samples of its questions, for scores that are not means over questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from deepinsert.controller.metrics.benchmark import Benchmark, Example
from deepinsert.controller.runs.progress_bars import progress_bar
from deepinsert.controller.statistics import bootstrap_scores


class ResampledScores:
    """Computes the headline of a benchmark in the same bootstrap samples of images for every variant.

    Args:
        benchmark: the benchmark, with its rule.
        examples: its questions (P).
        samples: the number of bootstrap samples.
    """

    def __init__(self, benchmark: Benchmark, examples: Sequence[Example], samples: int) -> None:
        self.benchmark = benchmark
        self.examples = examples
        self.samples = samples
        self._copies: dict[tuple[int, int], Example] = {}

    def headlines(self, answers: Sequence[str], variant: str) -> NDArray[np.float64]:
        """Return the headline (samples) of a variant's answers (P); `variant` labels the progress bar."""
        steps = progress_bar(range(self.samples), f"{variant}: interval of {self.benchmark.name}")

        def headline(rows: NDArray[np.int64]) -> float:
            next(steps)
            return self._headline(answers, rows)

        images = [example.prompt.image_key for example in self.examples]
        return bootstrap_scores(headline, len(images), images, self.samples)

    def _headline(self, answers: Sequence[str], rows: NDArray[np.int64]) -> float:
        """Return the headline for the questions of a sample, in their order."""
        repeats: Counter[int] = Counter()
        examples = []
        for row in rows.tolist():
            examples.append(self._copy(row, repeats[row]))
            repeats[row] += 1
        return self.benchmark.headline([answers[row] for row in rows], examples)

    def _copy(self, row: int, number: int) -> Example:
        """Return a question that is in a sample for the `number`-th time, counted from 0.

        Each copy has an image of its own, so that a rule that groups questions by image does not merge it
        with the others.
        """
        example = self.examples[row]
        if number == 0:
            return example
        if (row, number) not in self._copies:
            prompt = replace(
                example.prompt,
                id=f"{example.prompt.id} copy {number}",
                image_key=f"{example.prompt.image_key} copy {number}",
            )
            group = {"group": (example.facts["group"], number)} if "group" in example.facts else {}
            self._copies[row, number] = replace(example, prompt=prompt, facts={**example.facts, **group})
        return self._copies[row, number]
