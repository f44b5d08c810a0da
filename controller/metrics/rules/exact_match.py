"""Whether a generated answer is right: exact match after a normalisation that ignores how it is written.

Torch-free, so that a prediction file can be scored again without a model.
"""

from __future__ import annotations

import re
import unicodedata

COUNTED = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBER_WORDS = {word: str(value) for value, word in enumerate(COUNTED)}
ARTICLES = {"a", "an", "the"}
# A point or comma within or a sign before digits belongs to a number; an apostrophe or hyphen between letters
# to a word.
PUNCTUATION = re.compile(
    r"(?<!\d),|[.,](?!\d)|(?<=[^\W\d])\.|(?<!\w)['’]|(?<!\w)-(?!\.?\d)|['’-](?![\w.])|[^\w\s.,'’-]"
)


def normalise(answer: str) -> str:
    """`answer` in the form in which two answers are compared.

    Unicode compatibility form, lower case, no punctuation, number words up to ten as digits, no articles,
    single spaces: `"The two  Dogs."` becomes `"2 dogs"`. An answer of nothing but articles or punctuation
    keeps them, so that the option letter `"A"` is not lost.
    """
    text = " ".join(unicodedata.normalize("NFKC", answer).lower().replace("_", " ").split())
    words = PUNCTUATION.sub(_mark_or_space, text).split()
    kept = [NUMBER_WORDS.get(word, word) for word in words if word not in ARTICLES]
    return " ".join(kept or words) or text


def _mark_or_space(found: re.Match[str]) -> str:
    """A mark that belongs to the letter before it, as vowels do in Hindi, stays; punctuation is a space."""
    return found[0] if unicodedata.category(found[0]).startswith("M") else " "


def exact_match(prediction: str, reference: str) -> bool:
    """Whether both say the same after `normalise`; an empty prediction is never right."""
    return bool(prediction.strip()) and normalise(prediction) == normalise(reference)
