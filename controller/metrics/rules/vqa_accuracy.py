"""VQA accuracy: the score of an answer depends on how many people gave it.

There are two published normalisations, and numbers are only comparable within one: that of VQAv2 and OK-VQA
(github.com/GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py), and that of TextVQA (MMF's
EvalAIAnswerProcessor, which LLaVA's llava/eval/eval_textvqa.py uses).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from deepinsert.controller.metrics.contract import Benchmark, Example, Score, mean_score
from deepinsert.controller.metrics.formats.vqa import read_okvqa, read_textvqa, read_vqav2

COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0", **{word: str(value) for value, word in enumerate(COUNTED)}}
ARTICLES = frozenset({"a", "an", "the"})
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# Contractions by the word without any apostrophe ("dont"), and by each spelling that has only one of two
# ("hadnt've", "hadn'tve"). Words that also have another meaning ("shell", "id", "well") are left out.
_ONE_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
    how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't
    shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll
    that's there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't
    would've wouldn't y'all you'd you'll you're you've"""
_TWO_APOSTROPHES = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've"""


def _contractions() -> dict[str, str]:
    """Return the word with its apostrophes for each spelling that lacks one."""
    table = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
    for word in _TWO_APOSTROPHES.split():
        first, second, third = word.split("'")
        table[f"{first}{second}'{third}"] = word
        table[f"{first}'{second}{third}"] = word
    table["somebody'd"] = "somebodyd"  # the published table maps this word in the other direction
    table.update({spelling: "'ow's'at" for spelling in ("ow's'at", "'ows'at", "'ow'sat")})
    table.update({spelling: "y'all'd've" for spelling in ("yall'd've", "y'alld've", "y'all'dve")})
    return table


CONTRACTIONS = _contractions()


def without_punctuation(text: str) -> str:
    """Return `text` without points that no digit follows, and without other punctuation.

    Another mark becomes a space. It is removed if a space is beside it somewhere in the text, or if the text
    has a comma between digits.
    """
    has_thousands = re.search(r"\d,\d", text) is not None
    out = text
    for mark in PUNCTUATION:
        is_removed = has_thousands or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if is_removed else " ")
    # The published scripts pass a flag in the place of a count, and so remove at most 32 points.
    return re.sub(r"\.(?!\d)", "", out, count=32)


def plain_words(text: str) -> str:
    """Return `text` in lower case, without articles, and with the apostrophes of contractions.

    Number words up to ten become digits.
    """
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_answer(text: str) -> str:
    """Return an answer in the form in which the VQAv2 script compares it."""
    return plain_words(without_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def textvqa_answer(text: str) -> str:
    """Return an answer in the form in which the TextVQA script compares it.

    Commas and question marks are removed first, and a possessive is a separate word.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return vqa_answer(text)


def agreement(answer: str, references: Sequence[str]) -> float:
    """Return the mean, with each person left out in turn, of min(1, others with this answer / 3)."""
    same = sum(reference == answer for reference in references)
    total = sum(min(1.0, (same - (reference == answer)) / 3) for reference in references)
    return total / len(references)


def score_textvqa(answers: Sequence[str], examples: Sequence[Example]) -> Score:
    """Return TextVQA accuracy: answer and references have the same normal form."""
    return mean_score(
        [
            agreement(textvqa_answer(answer), [textvqa_answer(text) for text in example.references])
            for answer, example in zip(answers, examples, strict=True)
        ]
    )


def score_vqa(answers: Sequence[str], examples: Sequence[Example]) -> Score:
    """Return VQAv2 and OK-VQA accuracy; also by type of answer.

    References keep their words: the script removes only their punctuation, and only if people disagree.
    """
    items = []
    for answer, example in zip(answers, examples, strict=True):
        references = list(example.references)
        if len(set(references)) > 1:
            references = [without_punctuation(reference) for reference in references]
        items.append(agreement(vqa_answer(answer), references))
    return mean_score(items, [example.facts.get("answer_type", "other") for example in examples])


_VQA_SCRIPT = "github.com/GT-Vision-Lab/VQA: PythonEvaluationTools/vqaEvaluation/vqaEval.py"

BENCHMARKS = (
    Benchmark(
        "textvqa",
        "github.com/haotian-liu/LLaVA: llava/eval/eval_textvqa.py, m4c_evaluator.py",
        read_textvqa,
        score_textvqa,
    ),
    Benchmark("vqav2", _VQA_SCRIPT, read_vqav2, score_vqa),
    Benchmark("okvqa", _VQA_SCRIPT, read_okvqa, score_vqa),
)
