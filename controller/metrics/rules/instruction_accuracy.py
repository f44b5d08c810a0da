"""Instruction data in LLaVA's JSON as a benchmark: each answer is compared with the written one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepinsert.controller.metrics.contract import Benchmark, Example, Score, mean_score
from deepinsert.envs.data.instructions import load_instructions
from deepinsert.envs.prompts import prompts_from

from .exact_match import exact_match


def read(data: Path, image_root: Path | None) -> list[Example]:
    """Read one example per question, with the turns before it as context."""
    prompts = prompts_from(load_instructions(data, image_root), per="turn")
    return [Example(prompt, (prompt.answer,)) for prompt in prompts]


def score(answers: Sequence[str], examples: Sequence[Example]) -> Score:
    """Return the share of answers that equal their reference after `normalise`; also by source."""
    items = [
        exact_match(answer, example.references[0]) for answer, example in zip(answers, examples, strict=True)
    ]
    return mean_score(items, [example.prompt.source for example in examples])


BENCHMARKS = (Benchmark("instructions", "deepinsert.controller.metrics.rules.exact_match", read, score),)
