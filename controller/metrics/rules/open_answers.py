"""MMMU's rule for open questions: the answer's key phrases and numbers are compared with every reference.

It follows eval/eval_utils.py of github.com/MMMU-Benchmark/MMMU. Only line breaks divide an answer, because
the script lowers the case before it looks for the capitals that begin sentences.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
TRIVIAL = frozenset(":,.!?;'")
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def open_answer_is_right(answer: str, references: Sequence[str]) -> bool:
    """Return whether a key phrase contains a reference, or a number in one equals it to two decimals."""
    reference_forms = [form for reference in references for form in comparable(reference)]
    texts = [form for form in reference_forms if isinstance(form, str)]
    for phrase in key_phrases(answer):
        numbers = [number for pattern in NUMBERS for number in re.findall(pattern, phrase)]
        for form in (form for part in [phrase, *numbers] for form in comparable(part)):
            if isinstance(form, str):
                if any(text in form for text in texts):
                    return True
            elif form in reference_forms:
                return True
    return False


def key_phrases(answer: str) -> list[str]:
    """Return the shortest text of each line that follows its last "is", "so", "answer" or another key.

    In the last line "=" is a key too. If no line has a key, the whole answer is the only phrase.
    """
    whole = answer.strip().strip(".").lower()
    lines = whole.split("\n")
    phrases = []
    for number, line in enumerate(lines):
        keys = (*KEYS, "=") if number == len(lines) - 1 else KEYS
        tails = [line.split(key)[-1].strip() for key in keys if key in line]
        shortest = ""
        for tail in tails:
            shortest = tail if not shortest or len(tail) < len(shortest) else shortest
        if shortest and shortest not in TRIVIAL:
            phrases.append(shortest)
    return phrases or [whole]


def comparable(text: str) -> list[str | float]:
    """Return a number rounded to two decimals, or else the text in lower case.

    A single letter counts only beside a space.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]
