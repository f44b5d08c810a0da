"""Exact match of a generated answer and its reference, after both are normalised.

This module does not import torch, so that a prediction file can be scored again without a model.
"""

from __future__ import annotations

import re
import unicodedata

COUNTED = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBER_WORDS = {word: str(value) for value, word in enumerate(COUNTED)}
ARTICLES = {"a", "an", "the"}
# A point or comma within digits, or a sign before them, belongs to a number; an apostrophe or hyphen between
# letters belongs to a word.
PUNCTUATION = re.compile(
    r"(?<!\d),|[.,](?!\d)|(?<=[^\W\d])\.|(?<!\w)['’]|(?<!\w)-(?!\.?\d)|['’-](?![\w.])|[^\w\s.,'’-]"
)


def normalise(answer: str) -> str:
    """Return `answer` in the form in which two answers are compared.

    It has Unicode's compatibility form, lower case, no punctuation, number words up to ten as digits, no
    articles and single spaces: `"The two  Dogs."` becomes `"2 dogs"`. An answer that consists of articles or
    punctuation keeps them, so that the option letter `"A"` is not lost.
    """
    text = " ".join(unicodedata.normalize("NFKC", answer).lower().replace("_", " ").split())
    words = PUNCTUATION.sub(_mark_or_space, text).split()
    content_words = [NUMBER_WORDS.get(word, word) for word in words if word not in ARTICLES]
    return " ".join(content_words or words) or text


def _mark_or_space(match: re.Match[str]) -> str:
    """Keep a mark that belongs to the letter before it, such as Hindi's vowel signs; else return a space."""
    return match[0] if unicodedata.category(match[0]).startswith("M") else " "


def exact_match(prediction: str, reference: str) -> bool:
    """Return whether both are equal after `normalise`; an empty prediction is never right."""
    return bool(prediction.strip()) and normalise(prediction) == normalise(reference)
