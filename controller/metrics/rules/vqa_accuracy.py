"""VQA accuracy: an answer is as right as people agree with it.

Two published normalisations exist, and numbers are only comparable within one: that of VQAv2 and OK-VQA
(github.com/GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py), and that of TextVQA (MMF's
EvalAIAnswerProcessor, which LLaVA's llava/eval/eval_textvqa.py takes).
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

# Contractions by the word without all of its apostrophes ("dont"), and by each spelling that has lost one
# of two ("hadnt've", "hadn'tve"). Words that also mean something else ("shell", "id", "well") are not there.
_ONE_LOST = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
    how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't
    shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll
    that's there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't
    would've wouldn't y'all you'd you'll you're you've"""
_TWO = """couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've"""


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _ONE_LOST.split()}
    for word in _TWO.split():
        first, second, third = word.split("'")
        table[f"{first}{second}'{third}"] = word
        table[f"{first}'{second}{third}"] = word
    table["somebody'd"] = "somebodyd"  # the published table has this one the other way round
    table.update({spelling: "'ow's'at" for spelling in ("ow's'at", "'ows'at", "'ow'sat")})
    table.update({spelling: "y'all'd've" for spelling in ("yall'd've", "y'alld've", "y'all'dve")})
    return table


CONTRACTIONS = _contractions()


def without_punctuation(text: str) -> str:
    """`text` without points that no digit follows, and with other punctuation as a space, or as nothing where
    a space is beside that mark or the text has a comma between digits."""
    thousands = re.search(r"\d,\d", text) is not None
    out = text
    for mark in PUNCTUATION:
        joined = thousands or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if joined else " ")
    # The published scripts hand a flag where a count belongs and so remove no more than 32 points.
    return re.sub(r"\.(?!\d)", "", out, count=32)


def plain_words(text: str) -> str:
    """`text` in lower case, number words up to ten as digits, without articles, contractions with their
    apostrophes."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_answer(text: str) -> str:
    """An answer in the form in which the VQAv2 script compares it."""
    return plain_words(without_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def textvqa_answer(text: str) -> str:
    """An answer in the form in which the TextVQA script compares it: commas and question marks go first, and
    a possessive is a word of its own."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return vqa_answer(text)


def agreement(answer: str, references: Sequence[str]) -> float:
    """Mean over leaving one person out of min(1, others who said the same / 3), in [0, 1]."""
    same = sum(reference == answer for reference in references)
    total = sum(min(1.0, (same - (reference == answer)) / 3) for reference in references)
    return total / len(references)


def score_textvqa(answers: Sequence[str], examples: Sequence[Example]) -> Score:
    """TextVQA accuracy: answer and references in the same normal form."""
    return mean_score(
        [
            agreement(textvqa_answer(answer), [textvqa_answer(text) for text in example.references])
            for answer, example in zip(answers, examples, strict=True)
        ]
    )


def score_vqa(answers: Sequence[str], examples: Sequence[Example]) -> Score:
    """VQAv2 and OK-VQA accuracy, in the details by type of answer.

    References keep their words: the script takes only punctuation from them, and only where people disagree.
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
