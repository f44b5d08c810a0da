"""Conversations as a model's own processor writes them, and where in that text the answers are.

Everything goes through the chat template and the tokenizer; nothing here knows a family.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def text_part(text: str) -> dict[str, str]:
    """Text as a part of a chat message's content."""
    return {"type": "text", "text": text}


def special_tokens(processor: Any, tokenizer: Any) -> list[str]:
    """Texts of all special tokens, the placeholders included, longest first."""
    special = {str(token) for token in tokenizer.all_special_tokens}
    special.update(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    special.update(placeholders_of(processor))
    return sorted((token for token in special if token.strip()), key=lambda token: (-len(token), token))


def any_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def defused(message: dict[str, Any], unsafe: re.Pattern[str]) -> dict[str, Any]:
    def apart(match: re.Match[str]) -> str:
        return f"{match[0][0]} {match[0][1:]}"

    content = [
        text_part(unsafe.sub(apart, part["text"])) if part["type"] == "text" else part
        for part in message["content"]
    ]
    return {**message, "content": content}


def placeholders_of(processor: Any) -> list[str]:
    names = ("image_token", "video_token", "audio_token")
    return [str(token) for name in names if (token := getattr(processor, name, None))]


def placeholder_ids_of(processor: Any, tokenizer: Any) -> frozenset[int]:
    return frozenset(tokenizer.convert_tokens_to_ids(placeholders_of(processor)))


def render(processor: Any, messages: list[dict[str, Any]], *, generation_prompt: bool = False) -> str:
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)


def answered(
    processor: Any, name: str, chat: list[dict[str, Any]], special: Sequence[str], eos: str, every: bool
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation `name` and the spans of characters that carry loss in it: of the assistant's
    last turn, or of `every` one."""
    text = render(processor, chat)
    turns = [position for position, message in enumerate(chat) if message["role"] == "assistant"]
    last = turns[-1]
    spans = []
    for position in turns if every else [last]:
        before = render(processor, chat[:position], generation_prompt=True)
        through = text if position == last else render(processor, chat[: position + 1])
        # LLaVA-OneVision writes "assistant \n" before an answer, but "assistant\n" to ask for one.
        shared = before if through.startswith(before) else before.rstrip()
        said = _past_space(through, len(shared))
        start = len(before) if shared == before else said
        answer = chat[position]["content"][0]["text"].strip()
        if not (
            text.startswith(through)
            and through.startswith(shared)
            and through.startswith(answer, said if answer else start)
        ):
            raise ValueError(
                f"prompt {name!r}: the chat template of {type(processor).__name__} does not write "
                f"answer {answer[:60]!r} as a continuation of the conversation before it, so its tokens "
                "cannot be told from the others; use a template that renders a turn the same with and "
                "without what follows"
            )
        end = (said if answer else start) + len(answer)
        stop = _end_of_turn(through, end, special)
        if stop == end and position == last:
            text = through[:end] + eos
            stop = len(text)
        spans.append((start, stop))
    return text, spans


def _end_of_turn(text: str, end: int, special: Sequence[str]) -> int:
    """Where the special token that follows `end`, after white space at most, ends; `end` without one."""
    lead = _past_space(text, end)
    return next((lead + len(token) for token in special if text.startswith(token, lead)), end)


def _past_space(text: str, position: int) -> int:
    """The first position from `position` on that holds no white space."""
    return len(text) - len(text[position:].lstrip())


def writes_bos(tokenizer: Any, texts: Sequence[str]) -> bool:
    """Whether the template has written the beginning-of-text token, so that the tokenizer must not."""
    return bool(tokenizer.bos_token) and texts[0].startswith(tokenizer.bos_token)


@contextmanager
def pad_token_set(tokenizer: Any) -> Iterator[None]:
    """Lets a tokenizer without a pad token pad with eos; attention masks tell the two apart."""
    if tokenizer.pad_token is not None:
        yield
        return
    if tokenizer.eos_token is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has neither a pad nor an eos token; set tokenizer.pad_token"
        )
    tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.pad_token = None


def answer_positions(
    tokenizer: Any,
    text: str,
    spans: Sequence[tuple[int, int]],
    ids: list[int],
    placeholders: frozenset[int],
    arguments: dict[str, Any],
    name: str,
) -> list[int]:
    """Positions in `ids`, the row without padding, of the tokens that cover the `spans` of `text`.

    Raises `ValueError` naming the prompt `name` where the processor has not just repeated placeholders.
    """
    plain, covered = plain_tokens(tokenizer, text, spans, arguments)
    places = align(plain, ids, placeholders)
    if places is None or not covered:
        raise ValueError(
            f"prompt {name!r}: the processor's tokens are not its chat text with placeholders repeated, "
            "so the answer's tokens cannot be found; this processor is not supported"
        )
    return [places[position] for position in covered]


def plain_tokens(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]], arguments: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """Token ids of `text`, each placeholder written once, and which of them cover its `spans`."""
    plain = tokenizer(text, return_offsets_mapping=True, **arguments)
    # Whitespace tokens may have empty offsets, at the end of the characters they stand for.
    covered = [
        position
        for position, (start, end) in enumerate(plain["offset_mapping"])
        if any(end > a and (start < b or start == end == b) for a, b in spans)
    ]
    return plain["input_ids"], covered


def align(plain: list[int], expanded: list[int], placeholders: frozenset[int]) -> list[int] | None:
    """Position in `expanded` of each token of `plain`, whose placeholders `expanded` writes at length.

    A placeholder's own position is where its expansion starts. None where the two do not match.
    """
    places: list[int] = []
    here = 0
    position = 0
    while position < len(plain):
        marks = position
        while position < len(plain) and plain[position] in placeholders:
            position += 1
        if position > marks:
            places += [here] * (position - marks)
            while here < len(expanded) and expanded[here] in placeholders:
                here += 1
        end = position
        while end < len(plain) and plain[end] not in placeholders:
            end += 1
        segment = plain[position:end]
        if expanded[here : here + len(segment)] != segment:
            return None
        places += range(here, here + len(segment))
        here += len(segment)
        position = end
    return places if here == len(expanded) else None
