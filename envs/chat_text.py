"""Renders conversations with a model's chat template, and finds the answers' tokens in the result.

Everything goes through the chat template and the tokenizer; nothing here depends on a model family.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def text_part(text: str) -> dict[str, str]:
    """A text part of a chat message's content."""
    return {"type": "text", "text": text}


def special_tokens(processor: Any, tokenizer: Any) -> list[str]:
    """Texts of all special tokens, placeholders included, longest first."""
    special = {str(token) for token in tokenizer.all_special_tokens}
    special.update(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    special.update(placeholder_tokens(processor))
    return sorted((token for token in special if token.strip()), key=lambda token: (-len(token), token))


def literal_pattern(texts: Sequence[str]) -> re.Pattern[str]:
    """A pattern that matches any of the texts literally; no texts match nothing."""
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def break_special_tokens(message: dict[str, Any], pattern: re.Pattern[str]) -> dict[str, Any]:
    """The chat message with a space after the first character of each match of `pattern` in its text.

    The tokenizer then reads the spelling of a special token in users' data as plain text.
    """

    def with_space(match: re.Match[str]) -> str:
        return f"{match[0][0]} {match[0][1:]}"

    content = [
        text_part(pattern.sub(with_space, part["text"])) if part["type"] == "text" else part
        for part in message["content"]
    ]
    return {**message, "content": content}


def placeholder_tokens(processor: Any) -> list[str]:
    """Texts of the processor's placeholder tokens for images, videos and sounds."""
    names = ("image_token", "video_token", "audio_token")
    return [str(token) for name in names if (token := getattr(processor, name, None))]


def placeholder_ids_of(processor: Any, tokenizer: Any) -> frozenset[int]:
    """Token ids of the processor's placeholder tokens."""
    return frozenset(tokenizer.convert_tokens_to_ids(placeholder_tokens(processor)))


def render_chat(processor: Any, messages: list[dict[str, Any]], *, generation_prompt: bool = False) -> str:
    """The messages as text by the processor's chat template."""
    text: str = processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation_prompt
    )
    return text


def render_with_answers(
    processor: Any,
    prompt_id: str,
    chat: list[dict[str, Any]],
    special: Sequence[str],
    eos: str,
    every: bool,
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation and find the spans of characters that carry loss.

    A span covers an answer and the special token that ends its turn. Where the template writes no such token
    after the last answer, the text ends there with `eos`.

    Args:
        processor: Processor of the model, with its chat template.
        prompt_id: Id of the prompt, for errors.
        chat: The messages; the last one is the assistant's.
        special: Texts of the special tokens, longest first.
        eos: Text of the end-of-sequence token.
        every: Whether every assistant turn carries loss, or only the last.

    Returns:
        The text, and a (start, end) pair per answer.

    Raises:
        ValueError: The template does not write an answer as a continuation of the conversation before it.
    """
    text = render_chat(processor, chat)
    turns = [position for position, message in enumerate(chat) if message["role"] == "assistant"]
    last = turns[-1]
    spans = []
    for position in turns if every else [last]:
        before = render_chat(processor, chat[:position], generation_prompt=True)
        through = text if position == last else render_chat(processor, chat[: position + 1])
        answer = chat[position]["content"][0]["text"].strip()
        span = _answer_span(before, through, answer) if text.startswith(through) else None
        if span is None:
            raise ValueError(
                f"prompt {prompt_id!r}: the chat template of {type(processor).__name__} does not write "
                f"answer {answer[:60]!r} as a continuation of the conversation before it, so the answer's "
                "tokens cannot be distinguished from others; use a template that renders a turn in the same "
                "way with and without later turns"
            )
        start, end = span
        stop = _end_of_turn(through, end, special)
        if stop == end and position == last:
            text = through[:end] + eos
            stop = len(text)
        spans.append((start, stop))
    return text, spans


def _answer_span(before: str, through: str, answer: str) -> tuple[int, int] | None:
    """Start and end of an answer's characters in `through`; None where they do not follow `before`.

    `before` is the conversation up to the generation prompt, and `through` the one that includes the answer.
    """
    # LLaVA-OneVision writes "assistant \n" before an answer, but "assistant\n" as its generation prompt.
    shared = before if through.startswith(before) else before.rstrip()
    first = _skip_space(through, len(shared))
    start = len(before) if shared == before else first
    answer_start = first if answer else start
    if not (through.startswith(shared) and through.startswith(answer, answer_start)):
        return None
    return start, answer_start + len(answer)


def _end_of_turn(text: str, end: int, special: Sequence[str]) -> int:
    """End of the special token that follows `end`, directly or after white space; without one, `end`."""
    first = _skip_space(text, end)
    return next((first + len(token) for token in special if text.startswith(token, first)), end)


def _skip_space(text: str, position: int) -> int:
    """The first position from `position` on that holds no white space."""
    return len(text) - len(text[position:].lstrip())


def writes_bos(tokenizer: Any, texts: Sequence[str]) -> bool:
    """Whether the chat template writes the beginning-of-text token, so the tokenizer must not add it."""
    return bool(tokenizer.bos_token) and texts[0].startswith(tokenizer.bos_token)


@contextmanager
def temporary_pad_token(tokenizer: Any) -> Iterator[None]:
    """Let a tokenizer without a pad token pad with its eos token; the attention mask marks the padding.

    Raises `ValueError` where the tokenizer has neither.
    """
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
    processor: Any,
    text: str,
    spans: Sequence[tuple[int, int]],
    ids: list[int],
    arguments: dict[str, Any],
    prompt_id: str,
) -> list[int]:
    """Find the tokens of a row that cover an answer's characters.

    Args:
        processor: Processor of the model.
        text: The rendered conversation, with each placeholder once.
        spans: Spans of the characters of `text` that carry loss.
        ids: Token ids that the processor makes of `text`, without padding.
        arguments: Further arguments of the tokenizer's call.
        prompt_id: Id of the prompt, for errors.

    Returns:
        Positions in `ids`, ascending.

    Raises:
        ValueError: `ids` are not the tokens of `text` with placeholders repeated.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    plain_ids, covered = plain_tokens(tokenizer, text, spans, arguments)
    positions = align_tokens(plain_ids, ids, placeholder_ids_of(processor, tokenizer))
    if positions is None or not covered:
        raise ValueError(
            f"prompt {prompt_id!r}: the processor's tokens are not its chat text with placeholders repeated, "
            "so the answer's tokens cannot be found; this processor is not supported"
        )
    return [positions[index] for index in covered]


def plain_tokens(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]], arguments: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """Tokenize a rendered conversation, with each placeholder once.

    Args:
        tokenizer: Tokenizer of the model.
        text: The rendered conversation.
        spans: Spans of characters of `text`.
        arguments: Further arguments of the tokenizer's call.

    Returns:
        The token ids, and the indices of those that cover the spans.
    """
    encoding = tokenizer(text, return_offsets_mapping=True, **arguments)
    # Tokens of white space may have empty offsets, at the end of the characters they represent.
    covered = [
        index
        for index, (start, end) in enumerate(encoding["offset_mapping"])
        if any(end > first and (start < stop or start == end == stop) for first, stop in spans)
    ]
    return encoding["input_ids"], covered


def align_tokens(plain: list[int], expanded: list[int], placeholders: frozenset[int]) -> list[int] | None:
    """Position in `expanded` of each token of `plain`; None where the two do not match.

    `expanded` repeats each placeholder of `plain`. A placeholder's position is the start of its repetition.
    """
    positions: list[int] = []
    offset = 0
    index = 0
    while index < len(plain):
        first = index
        while index < len(plain) and plain[index] in placeholders:
            index += 1
        if index > first:
            positions += [offset] * (index - first)
            while offset < len(expanded) and expanded[offset] in placeholders:
                offset += 1
        end = index
        while end < len(plain) and plain[end] not in placeholders:
            end += 1
        segment = plain[index:end]
        if expanded[offset : offset + len(segment)] != segment:
            return None
        positions += range(offset, offset + len(segment))
        offset += len(segment)
        index = end
    return positions if offset == len(expanded) else None
