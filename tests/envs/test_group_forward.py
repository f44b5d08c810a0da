"""Questions about an image that are computed together have the results that each has alone."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image

from deepinsert.backbones import Backbone
from deepinsert.envs.prompts import Prompt, encode
from deepinsert.envs.rewards.block_forward import BlockForward
from deepinsert.envs.rewards.group_forward import GroupForward, GroupResult
from deepinsert.envs.rewards.group_prompts import group_prompts

QUESTIONS = {
    "What colour is it?": "red",
    "What shape is it?": "round",
    "Is it red?": "yes",
    "What colour is the cat?": "black and white",
    "Where?": "here",
}


def picture(colour: str, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, colour)


def question_prompt(
    question: str, *images: Image.Image, answer: str = "red and round", turns: int = 1
) -> Prompt:
    """Return a prompt whose images belong to the first of its turns."""
    messages: list = []
    for turn in range(turns):
        parts: list = [{"type": "image"}] * len(images) if turn == 0 else []
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": f"{question} {turn}"}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return Prompt(f"{question}/{turns}", "source", "key", messages, tuple(images), answer)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Prompts in mixed order: with one image, two images or none, wide and tall, with one or more turns."""
    red, blue, tall = picture("red"), picture("blue"), picture("teal", (30, 60))
    about_red = [question_prompt(question, red, answer=answer) for question, answer in QUESTIONS.items()]
    conversation = [question_prompt("And now?", red, turns=turns) for turns in (1, 2, 3)]
    both = [question_prompt(question, red, blue) for question in list(QUESTIONS)[:2]]
    mixed = itertools.chain.from_iterable(itertools.zip_longest(about_red, conversation, both))
    present = [prompt for prompt in mixed if prompt is not None]
    return [*present, question_prompt("Which one?", tall), question_prompt("What is two and two?")]


def separate_losses(backbone: Backbone, prompts: list[Prompt], layers) -> np.ndarray:
    """Return the losses (P, K) of each prompt by itself."""
    losses = []
    for prompt in prompts:
        forward = BlockForward(backbone, [prompt])
        inputs = forward.encode(slice(None))
        losses.append([float(forward.losses(inputs, layer)[0]) for layer in layers])
    return np.array(losses)


def assert_equal(one: GroupResult, other: GroupResult) -> None:
    for field in dataclasses.fields(GroupResult):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_losses_are_those_of_each_prompt_alone(small_backbone, prompts):
    layers = range(small_backbone.num_layers + 1)
    forward = GroupForward(small_backbone)
    result = forward.run(prompts, layers)
    assert forward.unshared_reason is None
    np.testing.assert_allclose(
        result.losses, separate_losses(small_backbone, prompts, layers), atol=1e-5, rtol=1e-5
    )
    assert np.ptp(result.losses[:-1], axis=1).min() > 1e-3, "the insert layer must make a difference"


def test_counts_first_tokens_and_greedy_flags_are_those_of_each_prompt_alone(small_backbone, prompts):
    layers = range(small_backbone.num_layers + 1)
    forward = GroupForward(small_backbone)
    result = forward.run(prompts, layers)
    for index, prompt in enumerate(prompts):
        separate = forward.run_separately([prompt], layers)
        for name in ("first_tokens", "greedy", "text_tokens", "multimodal_tokens"):
            expected = getattr(separate, name)[0]
            np.testing.assert_array_equal(getattr(result, name)[index], expected, err_msg=prompt.id)
        prompt_ids = encode(small_backbone.processor, [prompt], with_answers=False)["input_ids"][0]
        assert result.text_tokens[index] + result.multimodal_tokens[index] == len(prompt_ids)


def test_greedy_flags_agree_with_generation(tiny_backbone, rendered_data):
    """Greedy decoding writes the reference if and only if each label is the most probable token."""
    from deepinsert.envs.data.instructions import load_instructions
    from deepinsert.envs.prompts import prompts_from

    prompts = prompts_from(load_instructions(rendered_data))[:40]
    result = GroupForward(tiny_backbone).run(prompts, [0, 7])
    tokenizer = tiny_backbone.tokenizer
    assert 0 < result.greedy.mean() < 1
    for column, layer in enumerate([0, 7]):
        for index, prompt in enumerate(prompts):
            inputs = encode(tiny_backbone.processor, [prompt], with_answers=False)
            labels = encode(tiny_backbone.processor, [prompt])["labels"][0]
            reference = labels[labels >= 0].tolist()
            with tiny_backbone.insert_at(layer):
                ids = tiny_backbone.model.generate(**inputs, do_sample=False, max_new_tokens=len(reference))
            answer = ids[0, inputs["input_ids"].shape[1] :].tolist()
            assert bool(result.greedy[index, column]) == (answer == reference), tokenizer.decode(answer)
            assert result.first_tokens[index, column] == answer[0]


def test_results_depend_on_neither_layers_nor_history(small_backbone, prompts):
    forward = GroupForward(small_backbone)
    whole = forward.run(prompts, [0, 1, 2, 3, 4])
    for layers in ([2], [0, 4], [1, 3]):
        part = GroupForward(small_backbone).run(prompts, layers)
        np.testing.assert_array_equal(part.losses, whole.losses[:, layers])
    forward.run(prompts[::-1], [3])
    assert_equal(forward.run(prompts, [0, 1, 2, 3, 4]), whole)


@pytest.mark.parametrize("batch_tokens", [1, 40, 100])
def test_small_forwards_give_the_same_losses(small_backbone, prompts, batch_tokens):
    layers = [0, 2, 4]
    result = GroupForward(small_backbone, batch_tokens).run(prompts, layers)
    whole = GroupForward(small_backbone).run(prompts, layers)
    np.testing.assert_allclose(result.losses, whole.losses, atol=1e-5, rtol=1e-5)


def test_batch_tokens_bound_every_forward(small_backbone, prompts):
    rows: list[int] = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:2].numel()))
        for layer in small_backbone.model.model.language_model.layers
    ]
    try:
        GroupForward(small_backbone, 64).run(prompts, [0, 2])
    finally:
        for handle in handles:
            handle.remove()
    longest = max(encode(small_backbone.processor, [prompt])["input_ids"].numel() for prompt in prompts)
    assert max(rows) <= max(64, longest)


def test_a_model_that_cannot_share_gives_the_same_losses(small_backbone, prompts):
    """A model in training mode shares nothing; without dropout its losses are those of evaluation."""
    layers = [0, 1, 3]
    whole = GroupForward(small_backbone).run(prompts, layers)
    small_backbone.model.train()
    try:
        forward = GroupForward(small_backbone)
        result = forward.run(prompts, layers)
    finally:
        small_backbone.model.eval()
    assert forward.unshared_reason == "it is in training mode"
    np.testing.assert_allclose(result.losses, whole.losses, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(result.text_tokens, whole.text_tokens)


def test_loss_on_every_answer(small_backbone):
    """A prompt with a labelled answer before its last image runs by itself; the others share."""
    red = picture("red")
    labelled = dataclasses.replace(question_prompt("Well?", red, turns=3), loss_on="all")
    before = question_prompt("Before?", turns=1)
    after = question_prompt("And this?", red)
    interleaved = Prompt(
        "i", "s", "k", [*before.messages, *after.messages], (red,), after.answer, loss_on="all"
    )
    prompts = [labelled, interleaved, question_prompt("Well?", red)]
    result = GroupForward(small_backbone).run(prompts, [0, 2, 4])
    np.testing.assert_allclose(
        result.losses, separate_losses(small_backbone, prompts, [0, 2, 4]), atol=1e-5, rtol=1e-5
    )
    assert [group.members for group in group_prompts(small_backbone.processor, prompts)] == [[0, 2]]


def test_images_are_processed_once_per_group(small_backbone, monkeypatch):
    opened = []
    monkeypatch.setattr(Prompt, "load_images", _recording(Prompt.load_images, opened))
    red = picture("red")
    GroupForward(small_backbone).run([question_prompt(question, red) for question in QUESTIONS], [0, 1])
    assert len(opened) == 1


def _recording(function, calls):
    def recording(self):
        calls.append(self.id)
        return function(self)

    return recording


def test_different_open_pictures_are_different_groups(small_backbone):
    prompts = [question_prompt("What colour?", picture(colour)) for colour in ("red", "blue", "red")]
    result = GroupForward(small_backbone).run(prompts, [0])
    np.testing.assert_allclose(
        result.losses, separate_losses(small_backbone, prompts, [0]), atol=1e-5, rtol=1e-5
    )
    assert abs(result.losses[0, 0] - result.losses[1, 0]) > 1e-4


def test_batch_tokens_must_be_positive(tiny_backbone):
    with pytest.raises(ValueError, match="batch_tokens 0"):
        GroupForward(tiny_backbone, 0)
