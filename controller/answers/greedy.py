"""Correctness of greedy answers at many insert layers, with as little generation as possible.

If every token of the reference is the most probable one after the tokens before it, greedy decoding writes
the reference, and generation can be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deepinsert.backbones import Backbone
from deepinsert.controller.metrics.rules.exact_match import exact_match
from deepinsert.envs.prompts import IGNORED, Prompt, encode

from .batched import generation_inputs

EXTRA_TOKENS = 4
"""How many tokens an answer may be longer than its reference."""

NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "guidance_scale": (None, 1.0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
    "stop_strings": (None,),
    "max_time": (None,),
}
"""Fields of a generation config that can make greedy decoding choose another token than the most probable
one, with the values at which they do not."""


def greedy_correctness(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    insert_layers: Sequence[int],
    is_greedy: NDArray[np.bool_],
    cells: NDArray[np.bool_],
    batch_size: int = 32,
    advance: Callable[[int], object] = lambda count: None,
) -> NDArray[np.float64]:
    """Grade greedy answers to P prompts at K insert layers by `exact_match`.

    An answer does not depend on the batch it is generated in, unless two tokens are equally probable to
    within rounding.

    Args:
        backbone: the backbone that answers.
        prompts: the P prompts, each with its reference.
        insert_layers: the K insert layers.
        is_greedy: (P, K), whether every token of the reference is the most probable one.
        cells: (P, K), the cells to grade.
        batch_size: prompts per call of the model.
        advance: is called with the number of cells that have been graded since the last call.

    Returns:
        (P, K) float64: 1 for a right answer, 0 for a wrong one, NaN outside `cells`.
    """
    correct = np.full(cells.shape, np.nan)
    needs_reference = np.asarray((is_greedy & cells).any(axis=1))
    reference_answers = answers_without_generation(backbone, prompts, needs_reference, batch_size)
    has_answer = np.array([answer is not None for answer in reference_answers])
    without_generation = is_greedy & cells & has_answer[:, None]
    for row, answer in enumerate(reference_answers):
        if answer is not None:
            correct[row, without_generation[row]] = exact_match(answer, prompts[row].answer)
    advance(int(without_generation.sum()))
    for column, layer in enumerate(insert_layers):
        rows = np.flatnonzero(cells[:, column] & ~without_generation[:, column])
        for start in range(0, len(rows), batch_size):
            batch_rows = rows[start : start + batch_size]
            batch = [prompts[row] for row in batch_rows]
            answers = answers_at_layer(backbone, batch, layer)
            correct[batch_rows, column] = [
                exact_match(answer, prompt.answer) for answer, prompt in zip(answers, batch, strict=True)
            ]
            advance(len(batch_rows))
    return correct


def answers_at_layer(backbone: Backbone, prompts: Sequence[Prompt], insert_layer: int) -> list[str]:
    """Generate greedy answers to one batch, each at most `EXTRA_TOKENS` longer than its reference."""
    model: Any = backbone.model
    inputs = generation_inputs(backbone, prompts)
    start = inputs["input_ids"].shape[1]
    limits = answer_limits(backbone, prompts)
    with torch.inference_mode(), backbone.insert_at(insert_layer):
        tokens = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max(limits))
    answers = [row[start : start + limit] for row, limit in zip(tokens, limits, strict=True)]
    return list(backbone.tokenizer.batch_decode(answers, skip_special_tokens=True))


def answer_limits(backbone: Backbone, prompts: Sequence[Prompt]) -> list[int]:
    """Return the largest number of tokens that the answer to each prompt may have."""
    references = backbone.tokenizer([prompt.answer for prompt in prompts], add_special_tokens=False)
    return [len(ids) + EXTRA_TOKENS for ids in references["input_ids"]]


def answers_without_generation(
    backbone: Backbone, prompts: Sequence[Prompt], selected: NDArray[np.bool_], batch_size: int = 32
) -> list[str | None]:
    """Return the greedy answers to prompts whose reference consists of the most probable tokens.

    Args:
        backbone: the backbone that answers.
        prompts: the P prompts, each with its reference.
        selected: (P,), whether every token of a reference is the most probable one.
        batch_size: prompts that are encoded together.

    Returns:
        The answers. An answer is None outside `selected`, and if decoding may differ from the reference: its
        tokens do not continue the prompt's tokens (a tokenizer may merge across the border), it does not end
        in a token that ends generation, or the generation config changes the choice of tokens.
    """
    config: Any = backbone.model.generation_config
    answers: list[str | None] = [None] * len(prompts)
    if any(getattr(config, name, None) not in neutral for name, neutral in NEUTRAL_VALUES.items()):
        return answers
    end_ids = config.eos_token_id
    ends = set() if end_ids is None else {end_ids} if isinstance(end_ids, int) else set(end_ids)
    rows = np.flatnonzero(selected)
    for start in range(0, len(rows), batch_size):
        batch_rows = rows[start : start + batch_size]
        batch = [prompts[row] for row in batch_rows]
        references = _reference_tokens(backbone, batch)
        limits = answer_limits(backbone, batch)
        for row, tokens, limit in zip(batch_rows, references, limits, strict=True):
            is_end = [token in ends for token in tokens]
            if len(tokens) <= limit and sum(is_end) == 1 and is_end[-1]:
                answers[row] = backbone.tokenizer.decode(tokens, skip_special_tokens=True)
    return answers


def _reference_tokens(backbone: Backbone, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return the labelled tokens of each reference; none if they do not directly follow the prompt's."""
    answered = encode(backbone.processor, prompts)
    unanswered = encode(backbone.processor, prompts, with_answers=False)
    references = []
    for row in range(len(prompts)):
        present = answered["attention_mask"][row].bool()
        ids, labels = answered["input_ids"][row, present].tolist(), answered["labels"][row, present].tolist()
        prompt_ids = unanswered["input_ids"][row, unanswered["attention_mask"][row].bool()].tolist()
        tokens = [label for label in labels[len(prompt_ids) :] if label != IGNORED]
        follows = (
            ids[: len(prompt_ids)] == prompt_ids
            and labels[len(prompt_ids) : len(prompt_ids) + len(tokens)] == tokens
        )
        references.append(tokens if follows else [])
    return references
