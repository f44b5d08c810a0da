"""`Backbone.generate` gives each prompt of a mixed batch the answer that it gets alone."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from deepinsert.backbones import Backbone
from deepinsert.envs import Prompt, encode, load_instructions, prompts_from


class LayerByLength:
    """A policy that chooses a layer by the length of the question."""

    def layers(self, backbone: Backbone, prompts: list[Prompt]) -> list[int]:
        """Return the layer of each prompt."""
        return [len(prompt.question) % (backbone.num_layers + 1) for prompt in prompts]


def answer_alone(backbone: Backbone, prompt: Prompt, layer: int, tokens: int) -> str:
    """Return the answer to one prompt by the model's own `generate`, of `tokens` tokens at most."""
    inputs = encode(backbone.processor, [prompt], with_answers=False)
    with torch.no_grad(), backbone.insert_at(layer):
        ids = backbone.model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
    return backbone.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def prompts(rendered_data) -> list[Prompt]:
    """Return prompts of every source, with and without images, of several lengths."""
    return prompts_from(load_instructions(rendered_data))[::5]


@pytest.fixture(scope="module")
def answers(tiny_backbone, prompts) -> list[str]:
    layers = LayerByLength().layers(tiny_backbone, prompts)
    assert len(set(layers)) > 4
    return [answer_alone(tiny_backbone, *pair, 6) for pair in zip(prompts, layers, strict=True)]


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_a_mixed_batch_gets_the_answers_of_each_prompt_alone(tiny_backbone, prompts, answers, batch_size):
    batch_answers = tiny_backbone.generate(prompts, LayerByLength(), batch_size=batch_size, max_new_tokens=6)
    assert batch_answers == answers and any(answers)


def test_layers_may_be_given_by_hand(tiny_backbone, prompts, answers):
    layers = LayerByLength().layers(tiny_backbone, prompts)
    assert tiny_backbone.generate(prompts, insert_layer=layers, max_new_tokens=6) == answers
    at_5 = tiny_backbone.generate(prompts[:4], insert_layer=5, max_new_tokens=6)
    assert at_5 == [answer_alone(tiny_backbone, prompt, 5, 6) for prompt in prompts[:4]]
    by_default = tiny_backbone.generate(prompts[:4], max_new_tokens=6)
    assert by_default == [answer_alone(tiny_backbone, prompt, 0, 6) for prompt in prompts[:4]]
    assert tiny_backbone.generate([]) == []


def test_mixed_batches_of_other_families(small_backbone):
    """The images have several sizes, and the positions are 3-D."""
    pictures = [Image.radial_gradient("L").resize(size) for size in ((40, 20), (25, 60), (30, 30))]
    prompts = [
        Prompt.from_question("What is it?", pictures[0]),
        Prompt.from_question("Is the sky blue?"),
        Prompt.from_question("What colour is the larger one, and why?", pictures[1]),
        Prompt.from_question("Why?", pictures[2]),
        Prompt.from_question("And what is that?", pictures[1]),
    ]
    layers = [3, 2, 0, 4, 1]
    answers = small_backbone.generate(prompts, insert_layer=layers, max_new_tokens=8)
    for prompt, layer, answer in zip(prompts, layers, answers, strict=True):
        assert answer == answer_alone(small_backbone, prompt, layer, 8)
    assert len(set(answers)) == 5
    stock = small_backbone.generate(prompts, insert_layer=0, max_new_tokens=8)
    assert stock != answers, "layers must change answers, or this test shows nothing"


def test_options_reach_the_generate_of_the_model(tiny_backbone, prompts):
    several = tiny_backbone.generate(
        prompts[:2], insert_layer=[2, 6], num_beams=3, num_return_sequences=2, max_new_tokens=4
    )
    assert len(several) == 4
    one = tiny_backbone.generate(prompts[1:2], insert_layer=6, num_beams=3, max_new_tokens=4)
    assert several[2] == one[0]


def test_arguments_that_do_not_fit_are_refused(tiny_backbone, prompts):
    with pytest.raises(ValueError, match="both a policy and insert_layer 3"):
        tiny_backbone.generate(prompts, LayerByLength(), insert_layer=3)
    with pytest.raises(ValueError, match="2 insert layers for 3 prompts"):
        tiny_backbone.generate(prompts[:3], insert_layer=[1, 2])
    with pytest.raises(ValueError, match="insert layer"):
        tiny_backbone.generate(prompts[:1], insert_layer=99)
