"""Answers taken from the reference without generation are the answers that generation gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepinsert.backbones import Backbone
from deepinsert.controller.answers import greedy
from deepinsert.controller.answers.greedy import (
    answers_at_layer,
    answers_without_generation,
    greedy_correctness,
)
from deepinsert.controller.metrics.rules.exact_match import exact_match
from deepinsert.envs import RewardTable, load_instructions, prompts_from
from deepinsert.envs.prompts import Prompt

LAYERS = (0, 5, 8)


@pytest.fixture(scope="module")
def prompts(rendered_data: Path) -> list[Prompt]:
    """Every seventh question, and one without an image."""
    all_prompts = prompts_from(load_instructions(rendered_data))
    text = next(prompt for prompt in all_prompts if not prompt.images)
    return [*all_prompts[::7], text]


@pytest.fixture(scope="module")
def table(tiny_backbone: Backbone, prompts: list[Prompt]) -> RewardTable:
    filled = RewardTable(tiny_backbone, prompts, LAYERS)
    filled.fill()
    return filled


@pytest.fixture
def generation_counts(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """The number of answers generated while a test runs, by layer."""
    counts: dict[int, int] = {}

    def count_answers(backbone: Backbone, prompts: Sequence[Prompt], layer: int) -> list[str]:
        counts[layer] = counts.get(layer, 0) + len(prompts)
        return answers_at_layer(backbone, prompts, layer)

    monkeypatch.setattr(greedy, "answers_at_layer", count_answers)
    return counts


def test_the_grades_are_those_of_generating_everything(
    tiny_backbone: Backbone, prompts: list[Prompt], table: RewardTable, generation_counts: dict[int, int]
) -> None:
    cells = np.ones(table.losses.shape, dtype=bool)
    advances: list[int] = []
    correct = greedy_correctness(tiny_backbone, prompts, LAYERS, table.greedy == 1, cells, 8, advances.append)
    not_generated = cells.size - sum(generation_counts.values())
    assert sum(advances) == cells.size
    assert 0 < not_generated < cells.size  # some answers are generated, and some are not
    all_generated = greedy_correctness(tiny_backbone, prompts, LAYERS, np.zeros_like(cells), cells, 8)
    np.testing.assert_array_equal(correct, all_generated)
    assert 0 < correct.mean() < 1


def test_only_the_requested_cells_are_graded(
    tiny_backbone: Backbone, prompts: list[Prompt], table: RewardTable, generation_counts: dict[int, int]
) -> None:
    cells = np.zeros(table.losses.shape, dtype=bool)
    cells[:3, 1] = True
    correct = greedy_correctness(tiny_backbone, prompts, LAYERS, table.greedy == 1, cells)
    np.testing.assert_array_equal(~np.isnan(correct), cells)
    assert set(generation_counts) <= {5}


def test_answers_without_generation_are_the_generated_ones(
    tiny_backbone: Backbone, prompts: list[Prompt], table: RewardTable
) -> None:
    rows = np.flatnonzero(table.greedy[:, 0] == 1)
    answers = answers_without_generation(tiny_backbone, prompts, table.greedy[:, 0] == 1, batch_size=5)
    assert [index for index, answer in enumerate(answers) if answer is not None] == rows.tolist()
    generated = answers_at_layer(tiny_backbone, [prompts[row] for row in rows], 0)
    assert [answers[row] for row in rows] == generated
    assert all(exact_match(answer, prompts[row].answer) for answer, row in zip(generated, rows, strict=True))


def test_answers_do_not_depend_on_the_batch(tiny_backbone: Backbone, prompts: list[Prompt]) -> None:
    short = min(prompts, key=lambda prompt: len(prompt.answer))
    long = max(prompts, key=lambda prompt: len(prompt.answer))
    for layer in LAYERS:
        together = answers_at_layer(tiny_backbone, [short, long], layer)
        assert together == [answers_at_layer(tiny_backbone, [prompt], layer)[0] for prompt in (short, long)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("repetition_penalty", 1.3), ("suppress_tokens", [5]), ("min_new_tokens", 9), ("eos_token_id", None)],
)
def test_everything_is_generated_if_the_config_may_change_tokens(
    tiny_backbone: Backbone, prompts: list[Prompt], name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    selected = np.ones(3, dtype=bool)
    answers = answers_without_generation(tiny_backbone, prompts[:3], selected)
    assert all(answer is not None for answer in answers)
    monkeypatch.setattr(tiny_backbone.model.generation_config, name, value)
    assert answers_without_generation(tiny_backbone, prompts[:3], selected) == [None] * 3


def test_an_answer_that_generation_would_stop_early_is_generated(
    tiny_backbone: Backbone, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tiny_backbone.tokenizer(prompts[0].answer, add_special_tokens=False)["input_ids"]
    ends = [tiny_backbone.tokenizer.eos_token_id, ids[-1]]
    monkeypatch.setattr(tiny_backbone.model.generation_config, "eos_token_id", ends)
    assert answers_without_generation(tiny_backbone, prompts[:1], np.ones(1, dtype=bool)) == [None]


def test_an_answer_that_merges_with_its_prompt_is_generated(
    tiny_backbone: Backbone, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock_encode = greedy.encode

    def encode_with_merge(
        processor: Any, batch: Sequence[Prompt], *, with_answers: bool = True, **options: Any
    ) -> dict[str, torch.Tensor]:
        inputs = stock_encode(processor, batch, with_answers=with_answers, **options)
        if with_answers:
            first = (inputs["labels"] != -100).int().argmax(dim=1)
            inputs["input_ids"][torch.arange(len(first)), first - 1] += 1  # another token before the answer
        return inputs

    monkeypatch.setattr(greedy, "encode", encode_with_merge)
    assert answers_without_generation(tiny_backbone, prompts[:3], np.ones(3, dtype=bool)) == [None] * 3
