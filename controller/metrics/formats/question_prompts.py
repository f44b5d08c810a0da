"""Prompts from the questions of benchmarks, in LLaVA-1.5's wording, with images before the text.

The wording is that of LLaVA's evaluation files, so that numbers can be compared with published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from deepinsert.envs.chat_text import text_part
from deepinsert.envs.prompts import ImageRef, Prompt

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def question_prompt(
    name: str,
    source: str,
    question: str,
    images: Sequence[ImageRef | Image.Image],
    answer: str,
    image_key: str = "",
) -> Prompt:
    """Return a prompt of one question about images, which come before its text.

    Args:
        name: the id of the prompt.
        source: the category of the question.
        question: the text that the model receives, with its instruction.
        images: the images of the question.
        answer: the answer on which a loss is taken.
        image_key: what questions about the same image share; by default `name`.
    """
    content = [{"type": "image"}] * len(images) + [text_part(question)]
    return Prompt(name, source, image_key or name, conversation(content, answer), tuple(images), answer)


def conversation(content: list[dict[str, str]], answer: str) -> list[dict[str, Any]]:
    """Return chat messages: a question with these content parts, and its answer."""
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [text_part(answer)]},
    ]


def options_by_letter(options: Sequence[str]) -> dict[str, str]:
    """Return options by their letters, beginning with A."""
    return dict(zip(LETTERS, options, strict=False))


def with_options(question: str, options: Sequence[str]) -> str:
    """Return the question followed by one line per option, such as "A. dog"."""
    lines = [f"{letter}. {text}" for letter, text in options_by_letter(options).items()]
    return "\n".join([question, *lines])


def image_root_of(data: Path, image_root: Path | None, *folders: str) -> Path:
    """Return the folder of the images: the first of `folders` that exists below the root, or the root.

    The root is `image_root`, or by default the folder of `data`.
    """
    root = image_root if image_root is not None else data if data.is_dir() else data.parent
    return next((root / folder for folder in folders if (root / folder).is_dir()), root)
