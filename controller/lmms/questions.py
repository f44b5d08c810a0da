"""What an lmms-eval task asks, as our prompts and as arguments of `generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from deepinsert.envs.chat_text import text_part
from deepinsert.envs.data.instructions import IMAGE_MARK
from deepinsert.envs.data.media import open_image
from deepinsert.envs.prompts import Prompt

LONGEST = 1024
"""New tokens where a task says nothing, as in lmms-eval's own models."""
PASSED = ("num_beams", "top_k", "repetition_penalty", "length_penalty", "no_repeat_ngram_size")
"""Arguments of a task that reach `generate` as they are."""
SAMPLING = ("temperature", "top_p", "top_k")
BLANK_LINE = "\n\n"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Wish:
    """How a task wants answers generated: arguments of `generate`, and strings at which an answer ends.

    `ignored` names what the task says beyond that.
    """

    arguments: dict[str, Any]
    until: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> Wish:
        """The wish in a task's `generation_kwargs`: greedy unless its temperature is above 0.

        lmms-eval itself gives a blank line as `until` to tasks that say none, and its own models pass over
        it: a chain of thought has paragraphs.

        Raises `ValueError` for an `until` that is neither a string nor a list of strings.
        """
        until = said.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        if not all(isinstance(stop, str) for stop in until):
            raise ValueError(f"until {said['until']!r}: give a string or a list of strings")
        temperature = float(said.get("temperature") or 0)
        sample = temperature > 0 and said.get("do_sample", True)
        arguments = {"num_beams": 1} | {name: said[name] for name in PASSED if said.get(name) is not None}
        if sample:
            arguments |= {"temperature": temperature}
            arguments |= {"top_p": float(said["top_p"])} if said.get("top_p") else {}
        else:
            arguments.pop("top_k", None)
        longest = said.get("max_new_tokens")
        arguments |= {
            "do_sample": bool(sample),
            "max_new_tokens": LONGEST if longest is None else int(longest),
        }
        known = {"until", "do_sample", "max_new_tokens", *PASSED, *SAMPLING}
        return cls(
            arguments,
            tuple(stop for stop in until if stop not in ("", BLANK_LINE)),
            tuple(sorted(said.keys() - known)),
        )

    def cut(self, text: str) -> str:
        """`text` up to the first of the strings that end an answer."""
        ends = [where for stop in self.until if (where := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))].strip()


def chat_prompt(name: str, messages: Sequence[Mapping[str, Any]]) -> Prompt:
    """A prompt of lmms-eval's chat messages, whose media stand under `url`, with an answer to be given.

    Raises `ValueError` for a conversation that does not end in a question, and for video and audio.
    """
    said, images = [], []
    for message in messages:
        parts = message["content"]
        content: list[dict[str, str]] = []
        for part in [text_part(parts)] if isinstance(parts, str) else parts:
            if part["type"] == "text":
                content.append(text_part(part["text"]))
            else:
                images.append(image_of(name, part["type"], part.get("url")))
                content.append({"type": "image"})
        said.append({"role": message["role"], "content": content})
    if not said or said[-1]["role"] != "user":
        raise ValueError(f"{name}: a conversation must end in a question for there to be an answer")
    return prompt(name, said, images)


def simple_prompt(name: str, context: str, visuals: Sequence[Any], answer: str = "") -> Prompt:
    """A prompt of a text and its images: each where the text marks it, or all before it.

    Raises `ValueError` for video and audio.
    """
    images = [image_of(name, "image", visual) for visual in visuals]
    pieces = context.split(IMAGE_MARK)
    if images and len(pieces) == len(images) + 1:
        content: list[dict[str, str]] = []
        for position, piece in enumerate(pieces):
            content += [{"type": "image"}] if position else []
            content += [text_part(piece.strip("\n"))] if piece.strip() else []
    else:
        content = [{"type": "image"}] * len(images) + [text_part(context)]
    return prompt(name, [{"role": "user", "content": content}], images, answer)


def prompt(
    name: str, messages: list[dict[str, Any]], images: Sequence[Image.Image], answer: str = ""
) -> Prompt:
    asked = [*messages, {"role": "assistant", "content": [text_part(answer)]}]
    return Prompt(name, name.split("/")[0], name, asked, tuple(images), answer)


def image_of(name: str, kind: str, medium: Any) -> Image.Image:
    """The image that a task gives, opened where it is a local file. Raises `ValueError` for anything else."""
    if isinstance(medium, Image.Image):
        return medium.convert("RGB")
    if kind == "image" and isinstance(medium, str) and Path(medium).suffix.lower() in IMAGE_SUFFIXES:
        real = Path(medium).resolve()
        return open_image(real.parent, real.name)
    given = "video" if isinstance(medium, str) and kind == "image" else kind
    raise ValueError(
        f"{name} asks about {given} ({type(medium).__name__}): deepinsert answers text and images here; "
        "leave that task out"
    )
