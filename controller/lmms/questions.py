"""Converts an lmms-eval task's questions and settings to prompts and arguments of `generate`."""

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

DEFAULT_NEW_TOKENS = 1024
"""The default of `max_new_tokens`, as in lmms-eval's own models."""
GENERATE_ARGUMENTS = ("num_beams", "top_k", "repetition_penalty", "length_penalty", "no_repeat_ngram_size")
"""Settings of a task that reach `generate` unchanged."""
SAMPLING_ARGUMENTS = ("temperature", "top_p", "top_k")
BLANK_LINE = "\n\n"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tiff", ".webp"}


@dataclass(frozen=True)
class GenerationSettings:
    """How a task wants its answers generated.

    `arguments` are arguments of `generate`, an answer ends before the first of the strings `until`, and
    `ignored` names the task's other settings.
    """

    arguments: dict[str, Any]
    until: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @classmethod
    def from_task(cls, settings: Mapping[str, Any]) -> GenerationSettings:
        """Read a task's `generation_kwargs`; decoding is greedy unless its temperature is above 0.

        lmms-eval itself sets `until` to a blank line for tasks that do not set it. Its own models ignore
        that, because a chain of thought has paragraphs, and so does this class.

        Raises:
            ValueError: `until` is neither a string nor a list of strings.
        """
        until = settings.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        if not all(isinstance(stop, str) for stop in until):
            raise ValueError(f"until {settings['until']!r}: give a string or a list of strings")
        temperature = float(settings.get("temperature") or 0)
        samples = temperature > 0 and bool(settings.get("do_sample", True))
        arguments: dict[str, Any] = {"num_beams": 1}
        arguments |= {name: settings[name] for name in GENERATE_ARGUMENTS if settings.get(name) is not None}
        if samples:
            arguments["temperature"] = temperature
            if settings.get("top_p"):
                arguments["top_p"] = float(settings["top_p"])
        else:
            arguments.pop("top_k", None)
        max_new_tokens = settings.get("max_new_tokens")
        arguments["do_sample"] = samples
        arguments["max_new_tokens"] = DEFAULT_NEW_TOKENS if max_new_tokens is None else int(max_new_tokens)
        supported = {"until", "do_sample", "max_new_tokens", *GENERATE_ARGUMENTS, *SAMPLING_ARGUMENTS}
        return cls(
            arguments,
            tuple(stop for stop in until if stop not in ("", BLANK_LINE)),
            tuple(sorted(settings.keys() - supported)),
        )

    def truncate(self, text: str) -> str:
        """Return `text` up to the first of the strings that end an answer."""
        ends = [position for stop in self.until if (position := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))].strip()


def chat_prompt(name: str, chat_messages: Sequence[Mapping[str, Any]]) -> Prompt:
    """Return a prompt made of lmms-eval's chat messages, whose media are under `url`, without an answer.

    Raises:
        ValueError: the conversation does not end in a question, or it contains video or audio.
    """
    messages: list[dict[str, Any]] = []
    images: list[Image.Image] = []
    for message in chat_messages:
        parts = message["content"]
        content: list[dict[str, str]] = []
        for part in [text_part(parts)] if isinstance(parts, str) else parts:
            if part["type"] == "text":
                content.append(text_part(part["text"]))
            else:
                images.append(read_image(name, part["type"], part.get("url")))
                content.append({"type": "image"})
        messages.append({"role": message["role"], "content": content})
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f"{name}: a conversation must end in a question for there to be an answer")
    return make_prompt(name, messages, images)


def simple_prompt(name: str, context: str, visuals: Sequence[Any], answer: str = "") -> Prompt:
    """Return a prompt made of a text and its images.

    Args:
        name: the name of the prompt, such as `"task/3"`.
        context: the text. Its image marks give the places of the images if there are as many marks as images;
            otherwise all images come first.
        visuals: the images.
        answer: the reference; empty for a question to answer.

    Raises:
        ValueError: a visual is video or audio.
    """
    images = [read_image(name, "image", visual) for visual in visuals]
    pieces = context.split(IMAGE_MARK)
    if images and len(pieces) == len(images) + 1:
        content: list[dict[str, str]] = []
        for position, piece in enumerate(pieces):
            content += [{"type": "image"}] if position else []
            content += [text_part(piece.strip("\n"))] if piece.strip() else []
    else:
        content = [{"type": "image"}] * len(images) + [text_part(context)]
    return make_prompt(name, [{"role": "user", "content": content}], images, answer)


def make_prompt(
    name: str, messages: list[dict[str, Any]], images: Sequence[Image.Image], answer: str = ""
) -> Prompt:
    """Return a prompt whose last message is the answer.

    Args:
        name: the name of the prompt and of its images; its source is the part before the first slash.
        messages: the conversation up to the question.
        images: the images in the order of their places in the messages.
        answer: the reference; empty for a question to answer.
    """
    answered = [*messages, {"role": "assistant", "content": [text_part(answer)]}]
    return Prompt(name, name.split("/")[0], name, answered, tuple(images), answer)


def read_image(name: str, kind: str, medium: Any) -> Image.Image:
    """Return a task's image in RGB, opened if it is the path of a local file.

    Raises:
        ValueError: the medium is not an image.
    """
    if isinstance(medium, Image.Image):
        return medium.convert("RGB")
    if kind == "image" and isinstance(medium, str) and Path(medium).suffix.lower() in IMAGE_SUFFIXES:
        path = Path(medium).resolve()
        return open_image(path.parent, path.name)
    actual_kind = "video" if isinstance(medium, str) and kind == "image" else kind
    raise ValueError(
        f"{name} asks about {actual_kind} ({type(medium).__name__}): deepinsert answers only text and images "
        "here; leave that task out"
    )
