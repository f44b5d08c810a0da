"""Prompts, their conversion to model inputs (tokens, images, labels), and the loss of their answers.

Everything goes through the model's own processor and chat template; nothing here depends on a model family.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from deepinsert.envs.data.instructions import IMAGE_MARK, InstructionData, Record
from deepinsert.envs.data.media import DatasetError, decode_image, open_image

from .chat_text import (
    answer_positions,
    break_special_tokens,
    literal_pattern,
    placeholder_ids_of,
    render_chat,
    render_with_answers,
    special_tokens,
    temporary_pad_token,
    text_part,
    writes_bos,
)

if TYPE_CHECKING:
    from transformers.processing_utils import ProcessorMixin

IGNORED = -100
"""Label of a token that carries no loss; `transformers` uses the same value."""


@dataclass(frozen=True)
class ImageRef:
    """An image file below `root`, which is opened only on use; `origin` names its record in errors."""

    root: Path
    path: str
    origin: str = field(default="", compare=False)

    def open(self) -> Image.Image:
        """Decode the image to RGB; `DatasetError`, with the record's name, where that fails."""
        try:
            return self._decode()
        except DatasetError as error:
            raise DatasetError(f"{self.origin}: {error}" if self.origin else str(error)) from error

    def _decode(self) -> Image.Image:
        return open_image(self.root, self.path)


@dataclass(frozen=True)
class EncodedImage(ImageRef):
    """An image embedded in a data file such as Parquet, which is decoded only on use.

    `data` is the content of the image file; `root` and `path` name it.
    """

    data: bytes = field(default=b"", repr=False)

    def _decode(self) -> Image.Image:
        return decode_image(self.data, self.path)


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends in a reference answer.

    Args:
        id: Id of the prompt, unique within its data.
        source: Source of the data, such as the first folder of the first image's path.
        image_key: Key that prompts about the same images share.
        messages: Chat messages (`{"role", "content": [{"type": "image"} | {"type": "text", "text"}]}`); the
            last one is the assistant's.
        images: The images, in the order of the messages' image parts.
        answer: Text of the last message.
        loss_on: Whether all answers carry loss, or only the last.
    """

    id: str
    source: str
    image_key: str
    messages: list[dict[str, Any]]
    images: tuple[ImageRef | Image.Image, ...]
    answer: str
    loss_on: Literal["last", "all"] = "last"

    @property
    def question(self) -> str:
        """Text of the last question, without image marks."""
        last = next(message for message in reversed(self.messages) if message["role"] == "user")
        return "\n".join(part["text"] for part in last["content"] if part["type"] == "text")

    def load_images(self) -> list[Image.Image]:
        """Decode the images to RGB, in order; `DatasetError` with file, record and field where that fails."""
        return [
            image.open() if isinstance(image, ImageRef) else image.convert("RGB") for image in self.images
        ]

    @classmethod
    def to_generate(cls, processor: ProcessorMixin, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Inputs of `generate` for a batch of prompts: padded on the left, up to the generation prompt."""
        return encode(processor, prompts, with_answers=False, padding_side="left")

    @classmethod
    def from_question(
        cls, question: str, image: Image.Image | str | Path | None = None, answer: str = ""
    ) -> Prompt:
        """Make a prompt of one question about an image or none.

        Args:
            question: Text of the question; an `<image>` in it marks the place of the image.
            image: The image, or the path of its file, which may lie anywhere.
            answer: Text of the reference answer.

        Raises:
            ValueError: The question has several `<image>` marks.
        """
        images: tuple[ImageRef | Image.Image, ...] = ()
        key = "question"
        if isinstance(image, Image.Image):
            images = (image,)
        elif image is not None:
            path = Path(image).resolve()
            key = str(path)
            images = (ImageRef(path.parent, path.name),)
        content = _content(question, len(images)) if images else [text_part(question)]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [text_part(answer)]},
        ]
        if len(images) != _image_count(messages):
            raise ValueError(
                f"question {question!r} has {_image_count(messages)} {IMAGE_MARK} marks for one image"
            )
        return cls(key, "question", key, messages, images, answer)


def prompts_from(data: InstructionData, per: Literal["turn", "record"] = "turn") -> list[Prompt]:
    """Make prompts from instruction records.

    With `per="turn"`, each question is one prompt, with the turns before it as context and loss on its answer
    alone. With `per="record"`, each conversation is one prompt, with loss on all answers. Ids are unique: the
    turn is appended where a record has several ("000017#2"), and the record's position where an id repeats
    ("000017@801").

    Raises `ValueError` for another value of `per`.
    """
    if per not in ("turn", "record"):
        raise ValueError(f'per {per!r}: give "turn" or "record"')
    id_counts = Counter(record.id for record in data)
    prompts = []
    for record in data:
        name = record.id if id_counts[record.id] == 1 else f"{record.id}@{record.index}"
        messages = _messages(record)
        origin = f"{data.path}, record {record.index} (id {record.id!r}), field 'image'"
        images = tuple(ImageRef(data.root, image, origin) for image in record.images)
        for turn in range(1, len(record.turns) + 1):
            if per == "record" and turn < len(record.turns):
                continue
            context = messages[: 2 * turn]
            prompts.append(
                Prompt(
                    id=f"{name}#{turn}" if per == "turn" and len(record.turns) > 1 else name,
                    source=record.source,
                    image_key=record.image_key,
                    messages=context,
                    images=images[: _image_count(context)],
                    answer=record.turns[turn - 1].answer,
                    loss_on="last" if per == "turn" else "all",
                )
            )
    return prompts


def encode(
    processor: ProcessorMixin,
    prompts: Sequence[Prompt],
    *,
    with_answers: bool = True,
    padding_side: Literal["left", "right"] = "right",
) -> dict[str, Tensor]:
    """Convert a batch of prompts to model inputs; prompts with and without images may be mixed.

    With answers, `labels` (B, S) hold the token ids of the assistant's answers, and -100 elsewhere: each
    answer's text and the end-of-turn token that the template writes after it. Where the template writes no
    such token after the last answer (LLaVA-1.5), the tokenizer's eos token ends it, as in LLaVA's training.
    Where a tokenizer merges characters across the start of an answer, the token that holds the answer's first
    character is labelled, though `generate` starts from the unmerged form. Without answers, rows end with the
    template's generation prompt.

    A space breaks up text that spells one of the tokenizer's special tokens, so that data can neither insert
    an image nor end a turn. The eos token is the padding where the tokenizer has no pad token. Nothing is
    truncated.

    Args:
        processor: The model's processor.
        prompts: The prompts, at least one.
        with_answers: Whether to include the last answers and return labels.
        padding_side: Side of the padding; `generate` needs "left".

    Returns:
        The processor's tensors by name, such as `input_ids` (B, S) and `attention_mask` (B, S), and `labels`.

    Raises:
        ValueError: There are no prompts, or the answers cannot be located in the chat template's output.
        DatasetError: An image cannot be decoded.
    """
    if not prompts:
        raise ValueError("no prompts to encode")
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    chats = chat_texts(processor, prompts, with_answers)
    texts = [text for text, _ in chats]
    arguments = {"add_special_tokens": not writes_bos(tokenizer, texts)}
    images = [pictures for prompt in prompts if (pictures := prompt.load_images())]
    with temporary_pad_token(tokenizer):
        batch = processor(
            text=texts,
            **({"images": images} if images else {}),
            padding=True,
            padding_side=padding_side,
            return_tensors="pt",
            **arguments,
        )
    inputs = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    if with_answers:
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        for row, (prompt, (text, spans)) in enumerate(zip(prompts, chats, strict=True)):
            columns = inputs["attention_mask"][row].nonzero().squeeze(1)
            ids = inputs["input_ids"][row, columns]
            answer = answer_positions(processor, text, spans, ids.tolist(), arguments, prompt.id)
            labels[row, columns[answer]] = ids[answer]
        inputs["labels"] = labels
    return inputs


def chat_texts(
    processor: ProcessorMixin, prompts: Sequence[Prompt], with_answers: bool = True
) -> list[tuple[str, list[tuple[int, int]]]]:
    """Render each conversation by the chat template, and find the spans of characters that carry loss.

    Without answers, the generation prompt replaces the last answer, and there are no spans.
    """
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    special = special_tokens(processor, tokenizer)
    pattern = literal_pattern(special)
    chats = [[break_special_tokens(message, pattern) for message in prompt.messages] for prompt in prompts]
    if not with_answers:
        return [(render_chat(processor, chat[:-1], generation_prompt=True), []) for chat in chats]
    eos = tokenizer.eos_token or ""
    return [
        render_with_answers(processor, prompt.id, chat, special, eos, every=prompt.loss_on == "all")
        for prompt, chat in zip(prompts, chats, strict=True)
    ]


def text_token_ids(processor: ProcessorMixin, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt's text, as in `encode` without answers: no placeholder and no padding.

    No image is opened. The ids do not include tokens that a processor adds around its placeholders.
    """
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    placeholders = placeholder_ids_of(processor, tokenizer)
    texts = [text for text, _ in chat_texts(processor, prompts, with_answers=False)]
    rows = tokenizer(texts, add_special_tokens=not writes_bos(tokenizer, texts))["input_ids"]
    return [[token for token in row if token not in placeholders] for row in rows]


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token negative log-likelihood of each row's labelled tokens, in nats: shape (B,).

    `logits` (B, S, vocabulary) at position t predict `labels` (B, S) at t + 1; -100 carries no loss. The loss
    is computed in float32 (in float64 for float64 logits) and row by row, so that it does not depend on the
    other rows. Raises `ValueError` for a row without labels.
    """
    targets = labels[:, 1:]
    labelled = targets != IGNORED
    counts: list[int] = labelled.sum(dim=1).tolist()
    if 0 in counts:
        rows = [row for row, count in enumerate(counts) if count == 0]
        raise ValueError(f"rows {rows} have no answer token to compute a loss on")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = F.cross_entropy(logits[:, :-1][labelled].to(dtype), targets[labelled], reduction="none")
    return torch.stack([row.mean() for row in torch.split(losses, counts)])


def _content(question: str, images: int) -> list[dict[str, str]]:
    """Content parts of a question: each mark becomes an image; without marks, `images` images come first."""
    pieces = question.split(IMAGE_MARK)
    if len(pieces) == 1:
        return [{"type": "image"}] * images + [text_part(question)]
    content: list[dict[str, str]] = []
    for position, piece in enumerate(pieces):
        if position > 0:
            content.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if position < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        if piece.strip():
            content.append(text_part(piece))
    return content


def _messages(record: Record) -> list[dict[str, Any]]:
    """Chat messages of a record's turns."""
    unmarked = not any(IMAGE_MARK in turn.question for turn in record.turns)
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(record.turns):
        if record.images:
            content = _content(turn.question, len(record.images) if unmarked and number == 0 else 0)
        else:
            content = [text_part(turn.question)]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [text_part(turn.answer)]})
    return messages


def _image_count(messages: Sequence[dict[str, Any]]) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])
