"""Many questions about one image in one row, so that training pays for the image's tokens once.

A row is `USER: <image>...\\n` followed by branches, one for each question with its answer. A branch sees the
shared beginning and itself, and its positions go on from the image: every branch has the logits that it has
when it is asked alone through the chat template.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from deepinsert.backbones import insert_at
from deepinsert.envs.data.rendering import Question

from .initial_model import END, IMAGE, IMAGE_TOKENS

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
"""LLaVA's ending for questions with short answers; here on one question in twelve."""


@dataclass(frozen=True)
class Pack:
    """Rows of branches. All but `images` are (batch, seq): `branch` is 0 in the shared beginning, -1 in
    padding; `labels` hold the next token where it belongs to an answer, else -100."""

    images: Tensor | None
    input_ids: Tensor
    position_ids: Tensor
    branch: Tensor
    labels: Tensor
    kinds: list[list[str]]

    @property
    def attention_mask(self) -> Tensor:
        """Who sees whom, (batch, 1, seq, seq) bool: causal, within a branch and the shared beginning."""
        query, key = self.branch[:, :, None], self.branch[:, None, :]
        causal = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool).tril()
        return ((causal & ((key == query) | (key == 0))) | torch.eye(len(causal), dtype=torch.bool))[:, None]


def pack(
    tokenizer: PreTrainedTokenizerFast,
    asked: Sequence[Sequence[Sequence[Question]]],
    images: Tensor | None,
) -> Pack:
    """`asked[row][branch]` holds the turns of a dialogue; `images` is (batch, 3, 64, 64) or None."""
    start = _tokens(tokenizer, "USER: " + IMAGE * IMAGE_TOKENS + "\n" if images is not None else "")
    rows, kinds = [], []
    for dialogues in asked:
        ids, positions, branch, labels = (
            list(start),
            list(range(len(start))),
            [0] * len(start),
            [-100] * len(start),
        )
        for number, turns in enumerate(dialogues, 1):
            tokens, answers = _branch(tokenizer, turns, with_image=images is not None)
            ids += tokens
            positions += range(len(start), len(start) + len(tokens))
            branch += [number] * len(tokens)
            labels += [*answers[1:], -100]
        rows.append((ids, positions, branch, labels))
        kinds.append([turns[-1].kind for turns in dialogues])
    length = max(len(row[0]) for row in rows)
    fill = (tokenizer.pad_token_id, 0, -1, -100)
    input_ids, position_ids, branch_of, next_labels = (
        torch.tensor([row[i] + [fill[i]] * (length - len(row[i])) for row in rows]) for i in range(len(fill))
    )
    return Pack(images, input_ids, position_ids, branch_of, next_labels, kinds)


def _branch(
    tokenizer: PreTrainedTokenizerFast, turns: Sequence[Question], with_image: bool
) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for number, turn in enumerate(turns):
        user = "" if with_image and number == 0 else "USER: "
        question = _tokens(tokenizer, f"{user}{turn.text} ASSISTANT:")
        answer = _tokens(tokenizer, f" {turn.answer}{END}")
        ids += question + answer
        labels += [-100] * len(question) + answer
    return ids, labels


def _tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def dialogues(asked: Sequence[Question], rng: random.Random) -> list[list[Question]]:
    """Questions as branches: most alone, some after another one, some with LLaVA's ending."""
    branches = []
    for question in asked:
        if rng.random() < 1 / 12 and question.kind != "caption":
            question = Question(question.kind, question.text + SHORT_ANSWER, question.answer)
        before = [rng.choice(asked)] if rng.random() < 1 / 12 else []
        branches.append([*before, question])
    return branches


def answer_scores(
    model: LlavaForConditionalGeneration, packed: Pack, insert_layer: int
) -> tuple[Tensor, Tensor]:
    """Loss of each answer token in nats, and whether it is the likeliest; (answer tokens,) both, in the
    order of `packed.labels`."""
    asked = packed.labels != -100
    with insert_at(model, insert_layer):
        hidden = model.model(
            input_ids=packed.input_ids,
            pixel_values=packed.images,
            attention_mask=packed.attention_mask,
            position_ids=packed.position_ids,
            use_cache=False,
        ).last_hidden_state
    logits = model.lm_head(hidden[asked])
    losses = torch.nn.functional.cross_entropy(logits, packed.labels[asked], reduction="none")
    return losses, logits.argmax(-1) == packed.labels[asked]


def by_question(packed: Pack, values: Tensor, reduce: str) -> Tensor:
    """Reduce ("mean" or "amin") values of answer tokens to one per branch, (branches,), row by row."""
    asked = packed.labels != -100
    counts = torch.tensor([len(kinds) for kinds in packed.kinds])
    first = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)[:-1]])
    number = (packed.branch - 1 + first[:, None])[asked]
    result = torch.zeros(int(counts.sum()), dtype=values.dtype)
    return result.scatter_reduce(0, number, values, reduce, include_self=False)
