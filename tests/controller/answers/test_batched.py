"""Answers, losses and FLOPs of a prompt do not depend on the batch it is computed in."""

from pathlib import Path

import numpy as np
import pytest

from deepinsert.backbones import Backbone
from deepinsert.controller.answers.batched import generate_answers, losses_and_flops
from deepinsert.envs.data.instructions import load_instructions
from deepinsert.envs.prompts import Prompt, prompts_from

LAYERS = (0, 3, 8, 5)


@pytest.fixture(scope="module")
def prompts(rendered_data: Path) -> list[Prompt]:
    """Single questions, dialogues and questions without an image, of many lengths and in mixed order."""
    all_prompts = prompts_from(load_instructions(rendered_data))
    kinds = ["dialogue", "text", "caption", "count", "word", "color"]
    chosen = [prompt for kind in kinds for prompt in all_prompts if kind in prompt.id][::4]
    assert sum(not prompt.images for prompt in chosen) > 1 and any("#" in prompt.id for prompt in chosen)
    return [chosen[row] for row in np.random.default_rng(0).permutation(len(chosen))][:14]


def test_answers_are_those_of_each_prompt_alone(tiny_backbone: Backbone, prompts: list[Prompt]) -> None:
    layers = [LAYERS[row % len(LAYERS)] for row in range(len(prompts))]
    alone = generate_answers(tiny_backbone, prompts, layers, batch_size=1, max_new_tokens=16)
    assert len({len(answer) for answer in alone}) > 3
    for size in (3, 5, 100):
        assert generate_answers(tiny_backbone, prompts, layers, size, 16) == alone, f"batches of {size}"
    reversed_answers = generate_answers(tiny_backbone, prompts[::-1], layers[::-1], 4, 16)
    assert reversed_answers[::-1] == alone


def test_prompts_without_a_reference_have_no_loss_and_the_same_flops(
    tiny_backbone: Backbone, prompts: list[Prompt]
) -> None:
    layers = [LAYERS[row % len(LAYERS)] for row in range(len(prompts))]
    partly_answered = [prompt if row % 3 else without_answer(prompt) for row, prompt in enumerate(prompts)]
    losses, flops = losses_and_flops(tiny_backbone, prompts, layers, batch_size=4)
    partial_losses, same_flops = losses_and_flops(tiny_backbone, partly_answered, layers, batch_size=4)
    assert np.isfinite(losses).all()
    has_loss = ~np.isnan(partial_losses)
    assert has_loss.tolist() == [row % 3 != 0 for row in range(len(prompts))]
    np.testing.assert_allclose(partial_losses[has_loss], losses[has_loss], atol=1e-4)
    np.testing.assert_array_equal(same_flops, flops)


def without_answer(prompt: Prompt) -> Prompt:
    empty_answer = {"role": "assistant", "content": [{"type": "text", "text": ""}]}
    messages = [*prompt.messages[:-1], empty_answer]
    return Prompt(prompt.id, prompt.source, prompt.image_key, messages, prompt.images, "")
