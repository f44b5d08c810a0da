"""Observations: of the text alone, independent of the batch, with frozen normalisation."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from zoo import FAMILIES

from deepinsert.backbones import Backbone, deep_insert
from deepinsert.backbones.families import find_stack
from deepinsert.envs import (
    Normaliser,
    Observation,
    Prompt,
    encode,
    load_instructions,
    prompt_embeddings,
    prompts_from,
)
from deepinsert.envs.observations import LIMIT, check_observations, image_features, text_states
from deepinsert.envs.prompts import ImageRef, text_token_ids


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


def test_neither_answer_nor_image_is_observed(tiny_backbone, prompts, observations, tmp_path):
    changed = []
    for prompt in prompts:
        answer = {"role": "assistant", "content": [{"type": "text", "text": "nothing of the kind"}]}
        missing = tuple(ImageRef(tmp_path, "not-there.png") for _ in prompt.images)
        changed.append(
            dataclasses.replace(
                prompt, messages=[*prompt.messages[:-1], answer], answer="nothing of the kind", images=missing
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
    embeddings = prompt_embeddings(tiny_backbone, [Prompt.from_question(question) for question in questions])
    assert len({row.tobytes() for row in embeddings}) == 3


# Hidden states of text alone.


def pictures() -> list[Image.Image]:
    """A wide, a high and a square picture of different noise."""
    images = []
    for seed, size in enumerate([(40, 20), (25, 60), (30, 30)]):
        noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        images.append(Image.fromarray(noise))
    return images


@pytest.fixture(scope="module")
def illustrated() -> list[Prompt]:
    """Prompts of several lengths with one, no and two images; the first and the last share their image."""
    wide, high, square = pictures()
    both = Prompt.from_question("Which is larger?", wide)
    content = [{"type": "image"}, *both.messages[0]["content"]]
    both = dataclasses.replace(
        both, messages=[{"role": "user", "content": content}, both.messages[1]], images=(high, square)
    )
    return [
        Prompt.from_question("What colour is it?", wide, "Red"),
        Prompt.from_question("Is the sky blue, or is it another colour at night?", answer="Yes"),
        both,
        Prompt.from_question("Why?", high),
        Prompt.from_question("What else is there to be seen in this picture?", wide),
    ]


def text_states_with_the_image(backbone: Backbone, prompt: Prompt, layer: int, insert_layer: int):
    """Mean hidden state of the text tokens at the input of `layer`, with the image at `insert_layer`."""
    inputs = encode(backbone.processor, [prompt], with_answers=False)
    with torch.no_grad(), backbone.insert_at(insert_layer):
        states = backbone.model(**inputs, use_cache=False, output_hidden_states=True).hidden_states[layer]
    text = ~torch.isin(inputs["input_ids"][0], torch.tensor(sorted(backbone.placeholder_ids)))
    return states[0, text].mean(dim=0).numpy()


def check_states(backbone: Backbone, prompts: list[Prompt], layers: list[int]) -> None:
    for layer in layers:
        states = Observation(layer)(backbone, prompts)
        assert states.shape == (len(prompts), backbone.model.get_input_embeddings().weight.shape[1])
        assert states.dtype == np.float32
        for insert_layer in {layer, backbone.num_layers}:
            expected = [text_states_with_the_image(backbone, each, layer, insert_layer) for each in prompts]
            np.testing.assert_allclose(states, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
        stock = [text_states_with_the_image(backbone, each, layer, 0) for each in prompts]
        assert np.abs(states - stock).max() > 0.01, "the image must matter, or this test shows nothing"


def test_states_are_those_that_an_insertion_computes_on_the_tiny_backbone(tiny_backbone, prompts):
    check_states(tiny_backbone, prompts[:6], [1, 3, 7])


def test_states_are_those_that_an_insertion_computes(small_backbone, illustrated):
    check_states(small_backbone, illustrated, [1, 2, 3])


# These models always encode an image.
EXCEPTIONS = {"blip-2", "instructblip", "instructblipvideo", "kosmos-2"}
# These need a video's frames for its sound.
EXCEPTIONS |= {"qwen2_5_omni_thinker-video", "qwen3_omni_moe_thinker-video"}
# The encoder of Ovis2 embeds the tokens around an image; Kosmos-2.5 names no placeholder.
EXCEPTIONS |= {"ovis2", "kosmos-2.5"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - EXCEPTIONS))
def test_text_needs_no_features_in_any_family(name):
    family = FAMILIES[name]
    backbone = Backbone(deep_insert(family.model()), None, name)
    inputs = family.batch(backbone.model, padding="right")
    integers = {key: value for key, value in inputs.items() if not value.is_floating_point()}
    for layer in range(1, family.deepest + 1):
        if name.startswith("gemma3n"):
            with pytest.raises(ValueError, match="several streams"):
                text_states(backbone, integers, layer)
            continue
        alone, beside_features = text_states(backbone, integers, layer), text_states(backbone, inputs, layer)
        for actual, expected in zip(alone, beside_features, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_an_observation_is_the_same_in_any_batch(small_backbone, illustrated):
    for observation in (Observation(2), Observation(4), Observation(2, image=True)):
        together = observation(small_backbone, illustrated)
        for batch_size in (1, 2):
            divided = observation(small_backbone, illustrated[::-1], batch_size)[::-1]
            np.testing.assert_allclose(divided, together, rtol=1e-5, atol=1e-6 * np.abs(together).max())


def encoder_calls(backbone: Backbone) -> list[int]:
    """A list that gains an element per future call of the vision tower."""
    calls: list[int] = []
    tower = next(
        module
        for name, module in backbone.model.named_modules()
        if name.rpartition(".")[2] in ("vision_tower", "visual")
    )
    tower.register_forward_pre_hook(lambda module, args, kwargs: calls.append(1), with_kwargs=True)
    return calls


def test_text_needs_no_encoder_and_an_image_is_encoded_once(small_backbone, illustrated):
    backbone = dataclasses.replace(small_backbone, model=copy.deepcopy(small_backbone.model))
    calls = encoder_calls(backbone)
    deeper_calls: list[int] = []
    for layer in find_stack(backbone.model).layers[2:]:
        layer.register_forward_pre_hook(lambda module, args: deeper_calls.append(1))
    Observation(2)(backbone, illustrated)
    assert not calls and not deeper_calls
    Observation(2, image=True)(backbone, illustrated, batch_size=1)
    assert len(calls) == 3  # The wide picture, the high and the square one, the high one.
    assert not deeper_calls


def test_observing_leaves_the_model_as_it_was(small_backbone, illustrated):
    inputs = encode(small_backbone.processor, illustrated[:1])
    with torch.no_grad():
        before = small_backbone.model(**inputs).logits
        Observation(3, image=True)(small_backbone, illustrated)
        after = small_backbone.model(**inputs).logits
    assert torch.equal(before, after) and small_backbone.insert_layer == 0


def test_the_image_summary_is_the_mean_of_the_projected_features(small_backbone, illustrated):
    observations = Observation(1, image=True)(small_backbone, illustrated)
    width = observations.shape[1] // 2
    np.testing.assert_array_equal(observations[:, :width], Observation(1)(small_backbone, illustrated))
    summary = observations[:, width:]
    assert not summary[1].any() and np.abs(summary[[0, 2, 3]]).max(axis=1).min() > 0
    np.testing.assert_array_equal(summary[0], summary[4])
    for prompt, row in zip(illustrated, summary, strict=True):
        if prompt.images:
            inputs = encode(small_backbone.processor, [prompt], with_answers=False)
            with torch.no_grad():
                outputs = small_backbone.model(**inputs, output_hidden_states=True)
            image = torch.isin(inputs["input_ids"][0], torch.tensor(sorted(small_backbone.placeholder_ids)))
            expected = outputs.hidden_states[0][0, image].mean(dim=0).numpy()
            np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)


def test_layer_0_is_the_mean_embedding_bit_for_bit(tiny_backbone, prompts, observations):
    np.testing.assert_array_equal(Observation()(tiny_backbone, prompts), observations)
    with_image = Observation(image=True)(tiny_backbone, prompts)
    np.testing.assert_array_equal(with_image[:, : observations.shape[1]], observations)


def test_observations_have_names():
    assert Observation().name == "embeddings" and Observation(3).name == "hidden:3"
    assert Observation(3, image=True).name == "hidden:3+image"


def test_impossible_observations_are_refused(tiny_backbone, prompts):
    for wrong in (-1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="text_layer"):
            Observation(wrong)
    with pytest.raises(ValueError, match="hidden:8 at most"):
        Observation(9)(tiny_backbone, prompts[:1])
    with pytest.raises(ValueError, match="no prompts"):
        Observation(1)(tiny_backbone, [])


def test_a_model_that_always_encodes_an_image_is_refused(prompts):
    model = deep_insert(FAMILIES["blip-2"].model())
    with pytest.raises(ValueError, match="Blip2ForConditionalGeneration cannot run without an image"):
        Observation(1)(Backbone(model, None, "blip"), prompts[:1])


def test_features_inside_the_decoder_are_refused():
    family = FAMILIES["chameleon"]
    model = deep_insert(family.model())
    with pytest.raises(ValueError, match="inside its decoder"):
        image_features(Backbone(model, None, "chameleon"), family.batch(model))


def test_normalised_training_observations_have_mean_0_and_deviation_1(observations):
    normal = Normaliser.fit(observations)(observations)
    assert normal.dtype == np.float32 and normal.shape == observations.shape
    np.testing.assert_allclose(normal.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(normal.std(axis=0), 1, atol=1e-3)


def test_statistics_stay_frozen_and_outliers_are_clipped():
    normaliser = Normaliser.fit([[0.0, 7.0], [2.0, 7.0]])
    assert normaliser.mean.tolist() == [1, 7]
    assert normaliser.std.tolist() == [1, 1]  # A constant feature keeps its scale.
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
