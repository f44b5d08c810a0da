"""Whether greedy answers are right at many insert layers, generating only those that are not known already.

Where each token of the reference is the most probable one after those before it, greedy decoding writes the
reference: it need not be run.
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
"""How many tokens longer than its reference an answer may become."""

# What a generation config may hold that makes greedy decoding choose another than the most probable token,
# with the values that change nothing.
ALTERING: dict[str, tuple[Any, ...]] = {
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


def judge(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    insert_layers: Sequence[int],
    greedy: NDArray[np.bool_],
    wanted: NDArray[np.bool_],
    batch_size: int = 32,
    told: Callable[[int], object] = lambda done: None,
) -> NDArray[np.float64]:
    """Whether prompts are answered right, by `exact_match` of greedy answers: (P, K) of 1 and 0.

    Only the cells `wanted` (P, K) are judged, the others are NaN. `greedy` (P, K) says where every token of
    the reference is the most probable one. `told` hears how many cells were judged. An answer does not depend
    on the batch it is generated in, unless two tokens are equally probable to within rounding.
    """
    correct = np.full(wanted.shape, np.nan)
    asked_for = np.asarray((greedy & wanted).any(axis=1))
    sure = sure_answers(backbone, prompts, asked_for, batch_size)
    known = greedy & wanted & np.array([answer is not None for answer in sure])[:, None]
    for row, answer in enumerate(sure):
        if answer is not None:
            correct[row, known[row]] = exact_match(answer, prompts[row].answer)
    told(int(known.sum()))
    for column, layer in enumerate(insert_layers):
        rows = np.flatnonzero(wanted[:, column] & ~known[:, column])
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            asked = [prompts[row] for row in batch]
            answers = answers_at_layer(backbone, asked, layer)
            correct[batch, column] = [
                exact_match(answer, prompt.answer) for answer, prompt in zip(answers, asked, strict=True)
            ]
            told(len(batch))
    return correct


def answers_at_layer(backbone: Backbone, prompts: Sequence[Prompt], insert_layer: int) -> list[str]:
    """Greedy answers of a batch of prompts, each at most `EXTRA_TOKENS` longer than its reference."""
    model: Any = backbone.model
    inputs = generation_inputs(backbone, prompts)
    start = inputs["input_ids"].shape[1]
    limits = answer_limits(backbone, prompts)
    with torch.inference_mode(), backbone.insert_at(insert_layer):
        tokens = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max(limits))
    rows = [row[start : start + limit] for row, limit in zip(tokens, limits, strict=True)]
    return backbone.tokenizer.batch_decode(rows, skip_special_tokens=True)


def answer_limits(backbone: Backbone, prompts: Sequence[Prompt]) -> list[int]:
    """The most tokens each prompt's answer may have."""
    references = backbone.tokenizer([prompt.answer for prompt in prompts], add_special_tokens=False)
    return [len(ids) + EXTRA_TOKENS for ids in references["input_ids"]]


def sure_answers(
    backbone: Backbone, prompts: Sequence[Prompt], asked: NDArray[np.bool_], batch_size: int = 32
) -> list[str | None]:
    """What greedy decoding writes of each prompt (P) if each token of its reference is the most probable one.

    None for prompts that are not `asked` (P) for, and where decoding need not follow the reference: where its
    tokens do not continue those of the prompt (a tokenizer may merge across the border), where it does not
    end in a token that ends generation, or where the generation config alters the choice of tokens.
    """
    config: Any = backbone.model.generation_config
    answers: list[str | None] = [None] * len(prompts)
    if any(getattr(config, name, None) not in neutral for name, neutral in ALTERING.items()):
        return answers
    ends = config.eos_token_id
    ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    rows = np.flatnonzero(asked)
    for start in range(0, len(rows), batch_size):
        batch = [prompts[row] for row in rows[start : start + batch_size]]
        spoken = _spoken_tokens(backbone, batch)
        limits = answer_limits(backbone, batch)
        for row, tokens, limit in zip(rows[start : start + batch_size], spoken, limits, strict=True):
            ending = [token in ends for token in tokens]
            if len(tokens) <= limit and sum(ending) == 1 and ending[-1]:
                answers[row] = backbone.tokenizer.decode(tokens, skip_special_tokens=True)
    return answers


def _spoken_tokens(backbone: Backbone, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The labelled tokens of each prompt's answer; none where they do not follow the prompt's own at once."""
    whole, bare = encode(backbone.processor, prompts), encode(backbone.processor, prompts, with_answers=False)
    found = []
    for row in range(len(prompts)):
        kept = whole["attention_mask"][row].bool()
        ids, labels = whole["input_ids"][row, kept].tolist(), whole["labels"][row, kept].tolist()
        before = bare["input_ids"][row, bare["attention_mask"][row].bool()].tolist()
        said = [label for label in labels[len(before) :] if label != IGNORED]
        follows = ids[: len(before)] == before and labels[len(before) : len(before) + len(said)] == said
        found.append(said if follows else [])
    return found
