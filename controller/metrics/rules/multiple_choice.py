"""Multiple choice: ScienceQA, AI2D, MMBench (right under every rotation of the options) and MMMU.

Each benchmark has its own rule for finding the option in a free answer; numbers depend on it.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Mapping, Sequence

import numpy as np

from deepinsert.controller.metrics.contract import Benchmark, Example, Score, mean_score
from deepinsert.controller.metrics.formats.ai2d import read_ai2d
from deepinsert.controller.metrics.formats.mmbench import read_mmbench
from deepinsert.controller.metrics.formats.mmmu import read_mmmu
from deepinsert.controller.metrics.formats.scienceqa import read_scienceqa, without_image

from .open_answers import open_answer_is_right


def scienceqa_letter(answer: str) -> str:
    """The option of a ScienceQA answer: a letter alone, "C. ...", or "The answer is C"; else ""."""
    text = answer.replace("\n", ". ")
    if re.fullmatch(r"[A-E]", text.strip()):
        return text.strip()
    patterns = (r"^([A-E])\. ", r"The answer is ([A-E])\.", r"The answer is ([A-E])")
    found = next((match for pattern in patterns if (match := re.search(pattern, text))), None)
    return found[1] if found else ""


def score_scienceqa(answers: Sequence[str], examples: Sequence[Example]) -> Score:
    """Share of right letters; by subject."""
    items = [
        scienceqa_letter(answer) == example.references[0]
        for answer, example in zip(answers, examples, strict=True)
    ]
    return mean_score(items, [example.prompt.source for example in examples])


def ai2d_letter(answer: str) -> str:
    """The answer without case and punctuation, of "B. dog" only the letter: what AI2D's letter must equal."""
    found = re.match(r"\s*([A-Z])\.", answer)
    text = found[1] if found else answer
    return text.translate(str.maketrans("", "", string.punctuation)).strip().upper()


def score_ai2d(answers: Sequence[str], examples: Sequence[Example]) -> Score:
    """Share of right letters."""
    return mean_score(
        [
            ai2d_letter(answer) == example.references[0]
            for answer, example in zip(answers, examples, strict=True)
        ]
    )


def mmbench_letter(answer: str, options: Mapping[str, str]) -> str:
    """The one option whose letter is a word of the answer, or else the one whose text is in it; "" for none
    or several. (MMBench's own server lets a language model guess those.)"""
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1:
        return named[0]
    if len(answer) > 2 * sum(len(text) for text in options.values()):
        return ""
    said = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return said[0] if len(said) == 1 else ""


def score_mmbench(answers: Sequence[str], examples: Sequence[Example]) -> Score:
    """Share of questions that are answered right under every rotation of their options (circular evaluation).

    Every example of a question earns what the question earns. In the details "vanilla", the share of right
    answers to the options as published, and the circular share of each category.
    """
    right = [
        mmbench_letter(answer, example.facts["options"]) == example.references[0]
        for answer, example in zip(answers, examples, strict=True)
    ]
    whole: dict[str, bool] = {}
    for hit, example in zip(right, examples, strict=True):
        group = example.facts["group"]
        whole[group] = whole.get(group, True) and hit
    categories = {example.facts["group"]: example.prompt.source for example in examples}
    found = mean_score(list(whole.values()), [categories[group] for group in whole])
    first = [hit for hit, example in zip(right, examples, strict=True) if example.facts["rotation"] == 0]
    items = np.array([float(whole[example.facts["group"]]) for example in examples])
    details = {"vanilla": 100 * float(np.mean(first)), **found.details} if first else found.details
    return Score(found.headline, "circular accuracy", items, details)


def mmmu_letter(answer: str, options: Mapping[str, str]) -> str:
    """The option of an MMMU answer: the last "(B)", else the last word "B", else, in answers of more than
    five words, the option whose text comes last; "" where there is none."""
    text = answer
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form in ("({})", " {} "):
        named = [letter for letter in options if form.format(letter) in text]
        if named:
            return max(named, key=lambda letter: text.rfind(form.format(letter)))
    if len(text.split()) > 5:
        lower = text.lower()
        said = [letter for letter, option in options.items() if option.lower() in lower]
        if said:
            return max(said, key=lambda letter: lower.rfind(options[letter].lower()))
    return ""


def score_mmmu(answers: Sequence[str], examples: Sequence[Example]) -> Score:
    """Share of right answers; by subject.

    The published script guesses where it finds no option. The guess here depends on the question's id alone;
    "guessed" in the details says for how many of a hundred answers it was needed.
    """
    items, guessed = [], 0
    for answer, example in zip(answers, examples, strict=True):
        options = example.facts["options"]
        if not options:
            items.append(open_answer_is_right(answer, example.references))
            continue
        letter = mmmu_letter(answer, options)
        if not letter:
            guessed += 1
            letter = random.Random(f"MMMU {example.prompt.id}").choice(list(options))
        items.append(letter in example.references)
    found = mean_score(items, [example.prompt.source for example in examples])
    return Score(
        found.headline, found.unit, found.items, {**found.details, "guessed": 100 * guessed / len(items)}
    )


BENCHMARKS = (
    Benchmark(
        "scienceqa",
        "github.com/haotian-liu/LLaVA: llava/eval/eval_science_qa.py (questions with an image)",
        read_scienceqa,
        score_scienceqa,
        passed_over=without_image,
    ),
    Benchmark("ai2d", "github.com/EvolvingLMMs-Lab/lmms-eval: tasks/ai2d", read_ai2d, score_ai2d),
    Benchmark(
        "mmbench",
        "github.com/open-compass/VLMEvalKit: circular evaluation with exact matching",
        read_mmbench,
        score_mmbench,
    ),
    Benchmark("mmmu", "github.com/MMMU-Benchmark/MMMU: eval/eval_utils.py", read_mmmu, score_mmmu),
)
