"""Answers that need not be generated are those that would have been."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepinsert.controller.answers import greedy as greedy_answers
from deepinsert.controller.answers.greedy import answers_at_layer, judge, sure_answers
from deepinsert.controller.metrics.rules.exact_match import exact_match
from deepinsert.envs import RewardTable, load_instructions, prompts_from

LAYERS = (0, 5, 8)


@pytest.fixture(scope="module")
def prompts(rendered_data):
    """Every seventh question, and one without an image."""
    found = prompts_from(load_instructions(rendered_data))
    text = next(prompt for prompt in found if not prompt.images)
    return [*found[::7], text]


@pytest.fixture(scope="module")
def table(tiny_backbone, prompts):
    filled = RewardTable(tiny_backbone, prompts, LAYERS)
    filled.fill()
    return filled


@pytest.fixture
def generated(monkeypatch):
    """How many answers are generated while a test runs, by layer."""
    counts: dict[int, int] = {}

    def counting(backbone, prompts, layer):
        counts[layer] = counts.get(layer, 0) + len(prompts)
        return answers_at_layer(backbone, prompts, layer)

    monkeypatch.setattr(greedy_answers, "answers_at_layer", counting)
    return counts


def test_the_same_as_generating_everything(tiny_backbone, prompts, table, generated):
    wanted = np.ones(table.losses.shape, dtype=bool)
    told = []
    cheap = judge(tiny_backbone, prompts, LAYERS, table.greedy == 1, wanted, 8, told.append)
    saved = wanted.size - sum(generated.values())
    assert sum(told) == wanted.size
    assert 0 < saved < wanted.size  # both kinds were met
    every = judge(tiny_backbone, prompts, LAYERS, np.zeros_like(wanted), wanted, 8)
    np.testing.assert_array_equal(cheap, every)
    assert 0 < cheap.mean() < 1


def test_only_what_is_wanted_is_judged(tiny_backbone, prompts, table, generated):
    wanted = np.zeros(table.losses.shape, dtype=bool)
    wanted[:3, 1] = True
    judged = judge(tiny_backbone, prompts, LAYERS, table.greedy == 1, wanted)
    np.testing.assert_array_equal(~np.isnan(judged), wanted)
    assert set(generated) <= {5}


def test_sure_answers_are_what_is_generated(tiny_backbone, prompts, table):
    rows = np.flatnonzero(table.greedy[:, 0] == 1)
    sure = sure_answers(tiny_backbone, prompts, table.greedy[:, 0] == 1, batch_size=5)
    assert [index for index, answer in enumerate(sure) if answer is not None] == rows.tolist()
    given = answers_at_layer(tiny_backbone, [prompts[row] for row in rows], 0)
    assert [sure[row] for row in rows] == given
    assert all(exact_match(answer, prompts[row].answer) for answer, row in zip(given, rows, strict=True))


def test_answers_do_not_depend_on_the_batch(tiny_backbone, prompts):
    short = min(prompts, key=lambda prompt: len(prompt.answer))
    long = max(prompts, key=lambda prompt: len(prompt.answer))
    for layer in LAYERS:
        together = answers_at_layer(tiny_backbone, [short, long], layer)
        assert together == [answers_at_layer(tiny_backbone, [prompt], layer)[0] for prompt in (short, long)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("repetition_penalty", 1.3), ("suppress_tokens", [5]), ("min_new_tokens", 9), ("eos_token_id", None)],
)
def test_nothing_is_sure_where_generation_may_choose_other_tokens(
    tiny_backbone, prompts, name, value, monkeypatch
):
    asked = np.ones(3, dtype=bool)
    assert all(answer is not None for answer in sure_answers(tiny_backbone, prompts[:3], asked))
    monkeypatch.setattr(tiny_backbone.model.generation_config, name, value)
    assert sure_answers(tiny_backbone, prompts[:3], asked) == [None] * 3


def test_an_answer_in_which_generation_would_stop_early_is_not_sure(tiny_backbone, prompts, monkeypatch):
    ids = tiny_backbone.tokenizer(prompts[0].answer, add_special_tokens=False)["input_ids"]
    ends = [tiny_backbone.tokenizer.eos_token_id, ids[-1]]
    monkeypatch.setattr(tiny_backbone.model.generation_config, "eos_token_id", ends)
    assert sure_answers(tiny_backbone, prompts[:1], np.ones(1, dtype=bool)) == [None]


def test_an_answer_that_merges_with_its_prompt_is_not_sure(tiny_backbone, prompts, monkeypatch):
    real = greedy_answers.encode

    def merged(processor, batch, *, with_answers=True, **named):
        inputs = real(processor, batch, with_answers=with_answers, **named)
        if with_answers:
            first = (inputs["labels"] != -100).int().argmax(dim=1)
            inputs["input_ids"][torch.arange(len(first)), first - 1] += 1  # another token before the answer
        return inputs

    asked = np.ones(3, dtype=bool)
    monkeypatch.setattr(greedy_answers, "encode", merged)
    assert sure_answers(tiny_backbone, prompts[:3], asked) == [None] * 3
