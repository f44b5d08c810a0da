"""Multiple choice: ScienceQA, AI2D, MMBench (right under every rotation of the options) and MMMU.

Each benchmark has its own rule for finding the option in a free answer, and its numbers depend on this rule.
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
    """Return the option of a ScienceQA answer: a letter alone, "C. ...", or "The answer is C"; else ""."""
    text = answer.replace("\n", ". ")
    if re.fullmatch(r"[A-E]", text.strip()):
        return text.strip()
    patterns = (r"^([A-E])\. ", r"The answer is ([A-E])\.", r"The answer is ([A-E])")
    first = next((match for pattern in patterns if (match := re.search(pattern, text))), None)
    return first[1] if first else ""


def score_scienceqa(answers: Sequence[str], examples: Sequence[Example]) -> Score:
    """Return the share of right letters; also by subject."""
    items = [
        scienceqa_letter(answer) == example.references[0]
        for answer, example in zip(answers, examples, strict=True)
    ]
    return mean_score(items, [example.prompt.source for example in examples])


def ai2d_letter(answer: str) -> str:
    """Return the text that must equal AI2D's letter: the answer without case and punctuation.

    Of an answer such as "B. dog" it is only the letter.
    """
    match = re.match(r"\s*([A-Z])\.", answer)
    text = match[1] if match else answer
    return text.translate(str.maketrans("", "", string.punctuation)).strip().upper()


def score_ai2d(answers: Sequence[str], examples: Sequence[Example]) -> Score:
    """Return the share of right letters."""
    return mean_score(
        [
            ai2d_letter(answer) == example.references[0]
            for answer, example in zip(answers, examples, strict=True)
        ]
    )


def mmbench_letter(answer: str, options: Mapping[str, str]) -> str:
    """Return the only option whose letter is a word of the answer, or else whose text is part of it.

    The result is "" if there is none, or several. (MMBench's own server lets a language model guess then.)
    """
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1:
        return letters[0]
    if len(answer) > 2 * sum(len(text) for text in options.values()):
        return ""
    letters = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return letters[0] if len(letters) == 1 else ""


def score_mmbench(answers: Sequence[str], examples: Sequence[Example]) -> Score:
    """Return the share of questions answered right under every rotation of their options.

    This is circular evaluation: every example of a question has the score of the question. The details hold
    "vanilla", the share of right answers to the options as published, and the circular share per category.
    """
    is_right = [
        mmbench_letter(answer, example.facts["options"]) == example.references[0]
        for answer, example in zip(answers, examples, strict=True)
    ]
    group_is_right: dict[str, bool] = {}
    for right, example in zip(is_right, examples, strict=True):
        group = example.facts["group"]
        group_is_right[group] = group_is_right.get(group, True) and right
    categories = {example.facts["group"]: example.prompt.source for example in examples}
    score = mean_score(list(group_is_right.values()), [categories[group] for group in group_is_right])
    unrotated = [
        right for right, example in zip(is_right, examples, strict=True) if example.facts["rotation"] == 0
    ]
    items = np.array([float(group_is_right[example.facts["group"]]) for example in examples])
    vanilla = {"vanilla": 100 * float(np.mean(unrotated))} if unrotated else {}
    return Score(score.headline, "circular accuracy", items, {**vanilla, **score.details})


def mmmu_letter(answer: str, options: Mapping[str, str]) -> str:
    """Return the option of an MMMU answer: the last "(B)", or else the last word "B".

    Else, in answers of more than five words, it is the option whose text comes last. The result is "" if
    there is none.
    """
    text = answer
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form in ("({})", " {} "):
        letters = [letter for letter in options if form.format(letter) in text]
        if letters:
            return max(letters, key=lambda letter: text.rfind(form.format(letter)))
    if len(text.split()) > 5:
        lower = text.lower()
        letters = [letter for letter, option in options.items() if option.lower() in lower]
        if letters:
            return max(letters, key=lambda letter: lower.rfind(options[letter].lower()))
    return ""


def score_mmmu(answers: Sequence[str], examples: Sequence[Example]) -> Score:
    """Return the share of right answers; also by subject.

    The published script guesses where it finds no option. The guess here depends on the question's id alone,
    and "guessed" in the details is the percentage of answers that needed one.
    """
    items, guesses = [], 0
    for answer, example in zip(answers, examples, strict=True):
        options = example.facts["options"]
        if not options:
            items.append(open_answer_is_right(answer, example.references))
            continue
        letter = mmmu_letter(answer, options)
        if not letter:
            guesses += 1
            letter = random.Random(f"MMMU {example.prompt.id}").choice(list(options))
        items.append(letter in example.references)
    score = mean_score(items, [example.prompt.source for example in examples])
    details = {**score.details, "guessed": 100 * guesses / len(items)}
    return Score(score.headline, score.unit, score.items, details)


BENCHMARKS = (
    Benchmark(
        "scienceqa",
        "github.com/haotian-liu/LLaVA: llava/eval/eval_science_qa.py (questions with an image)",
        read_scienceqa,
        score_scienceqa,
        ignores_record=without_image,
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
