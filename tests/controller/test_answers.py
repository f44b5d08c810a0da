"""What a backbone says does not depend on how its prompts are put into batches."""

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
    every = prompts_from(load_instructions(rendered_data))
    kinds = ["dialogue", "text", "caption", "count", "word", "color"]
    chosen = [prompt for kind in kinds for prompt in every if kind in prompt.id][::4]
    assert sum(not prompt.images for prompt in chosen) > 1 and any("#" in prompt.id for prompt in chosen)
    return [chosen[row] for row in np.random.default_rng(0).permutation(len(chosen))][:14]


def test_answers_are_those_of_each_prompt_alone(tiny_backbone: Backbone, prompts: list[Prompt]) -> None:
    layers = [LAYERS[row % len(LAYERS)] for row in range(len(prompts))]
    alone = generate_answers(tiny_backbone, prompts, layers, batch_size=1, max_new_tokens=16)
    assert len({len(answer) for answer in alone}) > 3
    for size in (3, 5, 100):
        assert generate_answers(tiny_backbone, prompts, layers, size, 16) == alone, f"batches of {size}"
    turned = generate_answers(tiny_backbone, prompts[::-1], layers[::-1], 4, 16)
    assert turned[::-1] == alone


def test_prompts_without_a_reference_have_no_loss_and_the_same_flops(
    tiny_backbone: Backbone, prompts: list[Prompt]
) -> None:
    layers = [LAYERS[row % len(LAYERS)] for row in range(len(prompts))]
    unknown = [prompt if row % 3 else unanswered(prompt) for row, prompt in enumerate(prompts)]
    losses, flops = losses_and_flops(tiny_backbone, prompts, layers, batch_size=4)
    some, same = losses_and_flops(tiny_backbone, unknown, layers, batch_size=4)
    assert np.isfinite(losses).all()
    assert np.isnan(some).tolist() == [row % 3 == 0 for row in range(len(prompts))]
    np.testing.assert_allclose(some[~np.isnan(some)], losses[~np.isnan(some)], atol=1e-4)
    np.testing.assert_array_equal(same, flops)


def unanswered(prompt: Prompt) -> Prompt:
    said = {"role": "assistant", "content": [{"type": "text", "text": ""}]}
    messages = [*prompt.messages[:-1], said]
    return Prompt(prompt.id, prompt.source, prompt.image_key, messages, prompt.images, "")
