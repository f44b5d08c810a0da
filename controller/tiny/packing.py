"""Packing of many questions about one image into one row, so that training computes the image once.

A row begins with `USER: <image>...` and a newline, followed by branches, one per question with its answer. A
branch sees the shared beginning and itself, and its positions continue from the image, so every branch has
the logits that its question has alone in the chat template.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from deepinsert.backbones import insert_at
from deepinsert.envs.data.rendering import Question

from .initial_model import END, IMAGE, IMAGE_TOKENS

IGNORED = -100
"""Label of positions without a loss."""

PROMPT_BRANCH = 0
"""Branch number of the beginning that all branches share."""

PADDING_BRANCH = -1

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
"""LLaVA's ending for questions with short answers, which one question in twelve has."""


@dataclass(frozen=True)
class Pack:
    """Rows of branches, with their images."""

    images: Tensor | None
    """Pixels (B, 3, 64, 64), or None for rows without an image."""
    input_ids: Tensor
    """(B, S), as are the next three."""
    position_ids: Tensor
    branch: Tensor
    """0 in the shared beginning, -1 in padding, else the number of the branch from 1 on."""
    labels: Tensor
    """The next token if it belongs to an answer, else -100."""
    kinds: list[list[str]]
    """Kind of each row's questions, by branch."""

    @property
    def attention_mask(self) -> Tensor:
        """Mask (B, 1, S, S), bool: causal, within a branch and to the shared beginning."""
        query, key = self.branch[:, :, None], self.branch[:, None, :]
        causal = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool).tril()
        visible = causal & ((key == query) | (key == PROMPT_BRANCH))
        # Padding sees itself, so that its softmax is defined.
        return (visible | torch.eye(len(causal), dtype=torch.bool))[:, None]


class _Row(NamedTuple):
    """Token ids, position ids, branch numbers and labels of one row, one entry per token."""

    input_ids: list[int]
    position_ids: list[int]
    branch: list[int]
    labels: list[int]


def pack(
    tokenizer: PreTrainedTokenizerFast,
    dialogues: Sequence[Sequence[Sequence[Question]]],
    images: Tensor | None,
) -> Pack:
    """Pack dialogues into rows, padded on the right.

    `dialogues[row][branch]` holds the turns of a dialogue; `images` are (B, 3, 64, 64), or None.
    """
    beginning = "USER: " + IMAGE * IMAGE_TOKENS + "\n" if images is not None else ""
    start = _tokens(tokenizer, beginning)
    rows = [_pack_row(tokenizer, start, branches, images is not None) for branches in dialogues]
    kinds = [[turns[-1].kind for turns in branches] for branches in dialogues]
    length = max(len(row.input_ids) for row in rows)
    padding = _Row([tokenizer.pad_token_id], [0], [PADDING_BRANCH], [IGNORED])
    input_ids, position_ids, branch, labels = (
        torch.tensor([row[field] + padding[field] * (length - len(row[field])) for row in rows])
        for field in range(len(padding))
    )
    return Pack(images, input_ids, position_ids, branch, labels, kinds)


def _pack_row(
    tokenizer: PreTrainedTokenizerFast,
    start: list[int],
    branches: Sequence[Sequence[Question]],
    has_image: bool,
) -> _Row:
    """Append the branches to the shared beginning `start`."""
    row = _Row(list(start), list(range(len(start))), [PROMPT_BRANCH] * len(start), [IGNORED] * len(start))
    for number, turns in enumerate(branches, 1):
        tokens, answers = _branch(tokenizer, turns, has_image)
        row.input_ids.extend(tokens)
        row.position_ids.extend(range(len(start), len(start) + len(tokens)))
        row.branch.extend([number] * len(tokens))
        row.labels.extend([*answers[1:], IGNORED])
    return row


def _branch(
    tokenizer: PreTrainedTokenizerFast, turns: Sequence[Question], has_image: bool
) -> tuple[list[int], list[int]]:
    """Return the token ids of a dialogue, and the same ids with -100 outside the answers."""
    ids: list[int] = []
    answers: list[int] = []
    for number, turn in enumerate(turns):
        user = "" if has_image and number == 0 else "USER: "
        question = _tokens(tokenizer, f"{user}{turn.text} ASSISTANT:")
        answer = _tokens(tokenizer, f" {turn.answer}{END}")
        ids += question + answer
        answers += [IGNORED] * len(question) + answer
    return ids, answers


def _tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def make_dialogues(questions: Sequence[Question], rng: random.Random) -> list[list[Question]]:
    """Make one branch per question; some follow another question, some end as LLaVA's short questions."""
    branches = []
    for question in questions:
        if rng.random() < 1 / 12 and question.kind != "caption":
            question = Question(question.kind, question.text + SHORT_ANSWER, question.answer)
        earlier_turns = [rng.choice(questions)] if rng.random() < 1 / 12 else []
        branches.append([*earlier_turns, question])
    return branches


def answer_scores(
    model: LlavaForConditionalGeneration, packed: Pack, insert_layer: int
) -> tuple[Tensor, Tensor]:
    """Return each answer token's loss in nats, and whether it is the likeliest token.

    Both are (answer tokens,), in the order of `packed.labels`.
    """
    is_answer = packed.labels != IGNORED
    with insert_at(model, insert_layer):
        hidden = model.model(
            input_ids=packed.input_ids,
            pixel_values=packed.images,
            attention_mask=packed.attention_mask,
            position_ids=packed.position_ids,
            use_cache=False,
        ).last_hidden_state
    logits = model.lm_head(hidden[is_answer])
    losses = torch.nn.functional.cross_entropy(logits, packed.labels[is_answer], reduction="none")
    return losses, logits.argmax(-1) == packed.labels[is_answer]


def by_question(packed: Pack, values: Tensor, reduce: str) -> Tensor:
    """Reduce ("mean" or "amin") values of answer tokens to one per branch, (branches,), row by row."""
    is_answer = packed.labels != IGNORED
    counts = torch.tensor([len(kinds) for kinds in packed.kinds])
    first_index = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)[:-1]])
    index = (packed.branch - 1 + first_index[:, None])[is_answer]
    result = torch.zeros(int(counts.sum()), dtype=values.dtype)
    return result.scatter_reduce(0, index, values, reduce, include_self=False)
