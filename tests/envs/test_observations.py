"""Observations: the text of a prompt alone, the same for every batch, in frozen units."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from envs import Normaliser, Prompt, encode, load_instructions, prompt_embeddings, prompts_from
from envs.observations import LIMIT, check_observations
from envs.prompts import ImageRef, text_token_ids


@pytest.fixture(scope="module")
def prompts(rendered_data):
    return prompts_from(load_instructions(rendered_data))[::7]


@pytest.fixture(scope="module")
def observations(tiny_backbone, prompts):
    return prompt_embeddings(tiny_backbone, prompts)


def test_the_mean_embedding_of_the_text_tokens(tiny_backbone, prompts, observations):
    weight = tiny_backbone.model.get_input_embeddings().weight.detach()
    assert observations.shape == (len(prompts), weight.shape[1])
    assert observations.dtype == np.float32
    for prompt, observation in zip(prompts, observations, strict=True):
        ids = encode(tiny_backbone.processor, [prompt], with_answers=False)["input_ids"][0].tolist()
        text = [token for token in ids if token not in tiny_backbone.placeholder_ids]
        assert text_token_ids(tiny_backbone.processor, [prompt]) == [text]
        expected = torch.stack([weight[token] for token in text]).mean(dim=0)
        np.testing.assert_allclose(observation, expected.numpy(), atol=1e-6)


def test_the_batch_changes_no_bit(tiny_backbone, prompts, observations):
    for batch_size in (1, 3):
        np.testing.assert_array_equal(prompt_embeddings(tiny_backbone, prompts, batch_size), observations)


def test_neither_answer_nor_image_is_seen(tiny_backbone, prompts, observations, tmp_path):
    changed = []
    for prompt in prompts:
        answer = {"role": "assistant", "content": [{"type": "text", "text": "nothing of the kind"}]}
        gone = tuple(ImageRef(tmp_path, "not-there.png") for _ in prompt.images)
        changed.append(
            dataclasses.replace(
                prompt, messages=[*prompt.messages[:-1], answer], answer="nothing of the kind", images=gone
            )
        )
    np.testing.assert_array_equal(prompt_embeddings(tiny_backbone, changed), observations)


def test_a_placeholder_spelt_in_a_question_is_text(tiny_backbone):
    plain = Prompt.from_question("What does image mean?")
    spelt = Prompt.from_question("What does <image> mean?")
    ids = encode(tiny_backbone.processor, [spelt], with_answers=False)["input_ids"][0].tolist()
    assert text_token_ids(tiny_backbone.processor, [spelt]) == [ids]
    both = prompt_embeddings(tiny_backbone, [plain, spelt])
    assert not np.array_equal(both[0], both[1])


def test_different_questions_differ(tiny_backbone):
    questions = ["What colour is the circle?", "What word is written?", "What is 2 plus 2?"]
    seen = prompt_embeddings(tiny_backbone, [Prompt.from_question(question) for question in questions])
    assert len({row.tobytes() for row in seen}) == 3


def test_normalised_training_observations_have_mean_0_and_deviation_1(observations):
    normal = Normaliser.fit(observations)(observations)
    assert normal.dtype == np.float32 and normal.shape == observations.shape
    np.testing.assert_allclose(normal.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(normal.std(axis=0), 1, atol=1e-3)


def test_statistics_stay_frozen_and_outliers_are_clipped():
    normaliser = Normaliser.fit([[0.0, 7.0], [2.0, 7.0]])
    assert normaliser.mean.tolist() == [1, 7]
    assert normaliser.std.tolist() == [1, 1]  # a constant feature keeps its scale
    np.testing.assert_allclose(normaliser([[3.0, 7.5], [1e9, -1e9]]), [[2, 0.5], [LIMIT, -LIMIT]])
    np.testing.assert_allclose(normaliser([3.0, 7.5]), [2, 0.5])


def test_one_prompt_can_be_normalised():
    normal = Normaliser.fit([[0.3, -0.2]])([[0.3, -0.2]])
    assert normal.tolist() == [[0, 0]]


def test_bad_observations_are_named():
    with pytest.raises(ValueError, match=r"\(3,\)"):
        Normaliser.fit([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="last axis of 2"):
        Normaliser.fit([[0.0, 1.0]])([[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match="expected"):
        check_observations(np.zeros((3, 2)), 2)
    with pytest.raises(ValueError, match="prompt 1 are not finite"):
        check_observations([[0.0], [np.nan]], 2)
