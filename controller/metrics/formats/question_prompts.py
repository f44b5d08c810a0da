"""How a benchmark's question becomes a prompt: LLaVA-1.5's wording, images before the text.

The wording is that of LLaVA's evaluation files, so that numbers can be compared with published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from deepinsert.envs.chat_text import text_part
from deepinsert.envs.prompts import ImageRef, Prompt

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def ask(
    name: str,
    source: str,
    question: str,
    images: Sequence[ImageRef | Image.Image],
    answer: str,
    image_key: str = "",
) -> Prompt:
    """A prompt of one question about `images`, which come before its text."""
    content = [{"type": "image"}] * len(images) + [text_part(question)]
    return Prompt(name, source, image_key or name, conversation(content, answer), tuple(images), answer)


def conversation(content: list[dict[str, str]], answer: str) -> list[dict]:
    """A question of these content parts and its answer as chat messages."""
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [text_part(answer)]},
    ]


def lettered(options: Sequence[str]) -> dict[str, str]:
    """Options by their letters, A first."""
    return dict(zip(LETTERS, options, strict=False))


def with_options(question: str, options: Sequence[str]) -> str:
    """The question with a line for each option: "A. dog"."""
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in lettered(options).items())])


def root_of(data: Path, image_root: Path | None, *folders: str) -> Path:
    """The image root: `image_root` or the folder of `data`, or the first of `folders` that is in it."""
    base = image_root if image_root is not None else data if data.is_dir() else data.parent
    return next((base / folder for folder in folders if (base / folder).is_dir()), base)
