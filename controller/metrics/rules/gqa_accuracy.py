"""GQA accuracy: an answer is right if it is the published word, apart from case and points at its end."""

from __future__ import annotations

from collections.abc import Sequence

from deepinsert.controller.metrics.contract import Benchmark, Example, Score, mean_score
from deepinsert.controller.metrics.formats.gqa import read_gqa


def score(answers: Sequence[str], examples: Sequence[Example]) -> Score:
    """Return the share of exact matches after `rstrip(".")` and lower case; also by type of question."""
    items = [
        answer.rstrip(".").lower() == example.references[0]
        for answer, example in zip(answers, examples, strict=True)
    ]
    return mean_score(items, [example.facts.get("type", "other") for example in examples])


BENCHMARKS = (
    Benchmark(
        "gqa",
        "github.com/haotian-liu/LLaVA: scripts/convert_gqa_for_eval.py; eval.py of the GQA site",
        read_gqa,
        score,
    ),
)
