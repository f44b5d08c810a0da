"""MMMU's rule for open questions: the answer's key phrases and numbers, compared with any reference.

Follows eval/eval_utils.py of github.com/MMMU-Benchmark/MMMU. Only lines divide an answer: the script lowers
the case before it looks for the capitals that begin sentences.
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
    """Whether a key phrase holds a reference, or a number in one equals it to two decimals."""
    wanted = [form for reference in references for form in comparable(reference)]
    texts = [form for form in wanted if isinstance(form, str)]
    for phrase in key_phrases(answer):
        numbers = [number for pattern in NUMBERS for number in re.findall(pattern, phrase)]
        for form in (form for part in [phrase, *numbers] for form in comparable(part)):
            if isinstance(form, str):
                if any(text in form for text in texts):
                    return True
            elif form in wanted:
                return True
    return False


def key_phrases(answer: str) -> list[str]:
    """What follows the last "is", "so", "answer", ... of each line, the shortest of them; the whole answer
    where no line has one. In the last line "=" counts too."""
    whole = answer.strip().strip(".").lower()
    lines = whole.split("\n")
    phrases = []
    for number, line in enumerate(lines):
        keys = (*KEYS, "=") if number == len(lines) - 1 else KEYS
        tails = [line.split(key)[-1].strip() for key in keys if key in line]
        kept = ""
        for tail in tails:
            kept = tail if not kept or len(tail) < len(kept) else kept
        if kept and kept not in TRIVIAL:
            phrases.append(kept)
    return phrases or [whole]


def comparable(text: str) -> list[str | float]:
    """A number rounded to two decimals, else the text in lower case; one letter only beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]
