"""Prompts, and how they become what a model reads: tokens, images, labels.

Everything goes through the model's own processor and chat template; nothing here knows a family.
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
    answered,
    any_of,
    defused,
    pad_token_set,
    placeholder_ids_of,
    render,
    special_tokens,
    text_part,
    writes_bos,
)

if TYPE_CHECKING:
    from transformers.processing_utils import ProcessorMixin

IGNORED = -100
"""Label of a token that carries no loss, as everywhere in `transformers`."""


@dataclass(frozen=True)
class ImageRef:
    """An image below `root`, opened only when it is used. `origin` says which record named it."""

    root: Path
    path: str
    origin: str = field(default="", compare=False)

    def open(self) -> Image.Image:
        """The image in RGB. Raises `DatasetError` naming the record when it cannot be decoded."""
        try:
            return self._decode()
        except DatasetError as error:
            raise DatasetError(f"{self.origin}: {error}" if self.origin else str(error)) from error

    def _decode(self) -> Image.Image:
        return open_image(self.root, self.path)


@dataclass(frozen=True)
class EncodedImage(ImageRef):
    """An image that lies inside a data file, as in Parquet: `data` are its file's bytes, decoded only when it
    is used; `root` and `path` name it."""

    data: bytes = field(default=b"", repr=False)

    def _decode(self) -> Image.Image:
        return decode_image(self.data, self.path)


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends in the answer to be learnt or judged.

    `messages` are chat messages (`{"role", "content": [{"type": "image"} | {"type": "text", "text"}]}`)
    including the last, the assistant's, whose text is `answer`; `images` fill its image parts in order.
    `loss_on` says whether every answer carries loss or only the last.
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
        asked = next(message for message in reversed(self.messages) if message["role"] == "user")
        return "\n".join(part["text"] for part in asked["content"] if part["type"] == "text")

    def load_images(self) -> list[Image.Image]:
        """The images in RGB, in order. Raises `DatasetError` naming file, record and field."""
        return [
            image.open() if isinstance(image, ImageRef) else image.convert("RGB") for image in self.images
        ]

    @classmethod
    def to_generate(cls, processor: ProcessorMixin, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Inputs of `generate` for a batch of prompts: padded left, ending where the answers begin."""
        return encode(processor, prompts, with_answers=False, padding_side="left")

    @classmethod
    def from_question(
        cls, question: str, image: Image.Image | str | Path | None = None, answer: str = ""
    ) -> Prompt:
        """A prompt of one question. An `image` given as a path is the caller's own and may lie anywhere."""
        images: tuple[ImageRef | Image.Image, ...] = ()
        key = "question"
        if isinstance(image, Image.Image):
            images = (image,)
        elif image is not None:
            real = Path(image).resolve()
            key = str(real)
            images = (ImageRef(real.parent, real.name),)
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
    """Prompts of instruction records.

    "turn" makes one prompt of every question, with the turns before it as context and loss on its answer
    alone; "record" one of every conversation, with loss on all answers. Ids are unique: the turn is added to
    the id where a record has several ("000017#2"), the record's position where an id repeats ("000017@801").
    """
    if per not in ("turn", "record"):
        raise ValueError(f'per {per!r}: give "turn" or "record"')
    repeated = Counter(record.id for record in data)
    prompts = []
    for record in data:
        name = record.id if repeated[record.id] == 1 else f"{record.id}@{record.index}"
        messages = _messages(record)
        origin = f"{data.path}, record {record.index} (id {record.id!r}), field 'image'"
        images = tuple(ImageRef(data.root, image, origin) for image in record.images)
        for turn in range(1, len(record.turns) + 1):
            if per == "record" and turn < len(record.turns):
                continue
            said = messages[: 2 * turn]
            prompts.append(
                Prompt(
                    id=f"{name}#{turn}" if per == "turn" and len(record.turns) > 1 else name,
                    source=record.source,
                    image_key=record.image_key,
                    messages=said,
                    images=images[: _image_count(said)],
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
    """Model inputs for a batch of prompts, with and without images mixed as they come.

    With answers, `labels` (batch, seq) hold the ids of the assistant's answers and -100 elsewhere: each
    answer's text and the end-of-turn token that the template writes after it. Where the template writes none
    after the last answer (LLaVA-1.5), the tokenizer's eos token ends it, as in LLaVA's training. Without
    answers, rows end in the template's generation prompt; pad them on the left for `generate`. Where a
    tokenizer merges characters across the start of an answer, the token that holds the answer's first
    character is labelled, though `generate` starts from the unmerged form.

    Text that spells one of the tokenizer's special tokens is broken up by a space, so that data can neither
    place an image nor end a turn. Padding uses the eos token where the tokenizer has no pad token. Nothing is
    truncated.

    Raises `ValueError` for no prompts, and where the chat template is such that answers cannot be found in
    its output; `DatasetError` for an image that cannot be decoded.
    """
    if not prompts:
        raise ValueError("no prompts to encode")
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    marked = chat_texts(processor, prompts, with_answers)
    texts = [text for text, _ in marked]

    arguments: dict[str, Any] = {"add_special_tokens": not writes_bos(tokenizer, texts)}
    images = [loaded for prompt in prompts if (loaded := prompt.load_images())]
    with pad_token_set(tokenizer):
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
        placeholders = placeholder_ids_of(processor, tokenizer)
        inputs["labels"] = torch.full_like(inputs["input_ids"], IGNORED)
        for row, (prompt, (text, spans)) in enumerate(zip(prompts, marked, strict=True)):
            where = inputs["attention_mask"][row].nonzero().squeeze(1)
            ids = inputs["input_ids"][row, where]
            answer = answer_positions(
                tokenizer, text, spans, ids.tolist(), placeholders, arguments, prompt.id
            )
            inputs["labels"][row, where[answer]] = ids[answer]
    return inputs


def chat_texts(
    processor: ProcessorMixin, prompts: Sequence[Prompt], with_answers: bool = True
) -> list[tuple[str, list[tuple[int, int]]]]:
    """Each conversation as the chat template writes it, and the spans of its characters that carry loss.

    Without answers, the last answer is left out and asked for.
    """
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    special = special_tokens(processor, tokenizer)
    unsafe = any_of(special)
    chats = [[defused(message, unsafe) for message in prompt.messages] for prompt in prompts]
    if not with_answers:
        return [(render(processor, chat[:-1], generation_prompt=True), []) for chat in chats]
    end = tokenizer.eos_token or ""
    return [
        answered(processor, prompt.id, chat, special, end, every=prompt.loss_on == "all")
        for prompt, chat in zip(prompts, chats, strict=True)
    ]


def text_token_ids(processor: ProcessorMixin, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Ids of each prompt's text tokens, as `encode` without answers gives them: no placeholder, no padding.

    No image is opened. Tokens that a processor itself writes around its placeholders are not among them.
    """
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    placeholders = placeholder_ids_of(processor, tokenizer)
    texts = [text for text, _ in chat_texts(processor, prompts, with_answers=False)]
    rows = tokenizer(texts, add_special_tokens=not writes_bos(tokenizer, texts))["input_ids"]
    return [[token for token in row if token not in placeholders] for row in rows]


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token negative log-likelihood of each row's labelled tokens, in nats: shape (batch,).

    `logits` (batch, seq, vocabulary) at position t predict `labels` (batch, seq) at t + 1; -100 carries no
    loss. Computed in float32 (float64 for such logits), row by row, so that a row's loss does not depend on
    its neighbours. Raises `ValueError` for a row without labels.
    """
    targets = labels[:, 1:]
    kept = targets != IGNORED
    counts = kept.sum(dim=1).tolist()
    if 0 in counts:
        rows = [row for row, count in enumerate(counts) if count == 0]
        raise ValueError(f"rows {rows} have no answer token to compute a loss on")
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = F.cross_entropy(logits[:, :-1][kept].to(wide), targets[kept], reduction="none")
    return torch.stack([row.mean() for row in losses.split(counts)])


def _content(question: str, images: int) -> list[dict[str, str]]:
    """Content parts of a question about images: each mark an image, in place; without marks, images first."""
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
