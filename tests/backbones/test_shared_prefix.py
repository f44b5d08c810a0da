"""Branches of a shared prefix give the logits of each text alone, at every insert layer, with less work."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig, LlavaForConditionalGeneration
from zoo import FAMILIES, PLACEHOLDER, TEXT, Family, logits_of, skipping_what_is_missing
from zoo.llava_like import CLIP

from deepinsert.backbones import deep_insert, insert_at
from deepinsert.backbones.mechanism.shared_prefix import Branches, CannotShareError, SharedPrefix

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}

SHARING = [
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen2_audio",
    "aria",
    "mistral3",
]
"""One family of each kind: plain, tiles, 3-D positions, DeepStack, sounds, experts."""

REFUSING = {
    "gemma3": "attention masks of its own",
    "gemma4": "later layers share keys",
    "lfm2_vl": "carry a state",
    "chameleon": "embeds the tokens itself",
    "blip-2": "needs pixel_values",
    "ovis2": "embeds a text otherwise",
    "llama4": "scales with the number of a row",
    "florence2": "encoder-decoder",
}
"""Families that are refused, with a part of the message."""


@pytest.fixture(scope="module")
def model_of():
    """Return a function that builds the model of a family once."""
    models: dict = {}

    def model(name: str):
        if name not in models:
            with skipping_what_is_missing():
                models[name] = deep_insert(FAMILIES[name].model())
        return models[name]

    return model


def example(family: Family, model, row: int = 0):
    """Return the inputs of one unpadded row that ends in words, its prefix's length, and the ids after it."""
    inputs = family.batch(model, padding="right", only=row)
    length = int(family.multimodal(inputs["input_ids"])[0].nonzero().max()) + 1
    return inputs, length, inputs["input_ids"][0, length:]


def two_texts(tail):
    """Return a text that differs from `tail` after its first token, and both as a tree of 2 n - 1 tokens."""
    count = len(tail)
    other = torch.cat([tail[:1], tail[1:].flip(0) + 1])
    lower = torch.ones(count, count, dtype=torch.bool).tril()
    visible = torch.block_diag(lower, lower[1:, 1:]).bool()
    visible[count:, 0] = True
    depth = torch.cat([torch.arange(count), torch.arange(1, count)])
    owner = torch.zeros(1, dtype=torch.long)
    return other, Branches(owner, torch.cat([tail, other[1:]])[None], depth[None], visible[None])


def check_branches(family: Family, model, row: int) -> None:
    """Compare the logits of two texts behind a shared prefix with those of each text alone."""
    inputs, length, tail = example(family, model, row)
    other, branches = two_texts(tail)
    layers = list(range(family.deepest + 1))
    with torch.no_grad():
        shared = SharedPrefix(model, inputs, length, {})
        logits = {layer: shared.logits(states[0]) for layer, _, states in shared.run([branches], layers)}
    for layer in layers:
        with insert_at(model, layer):
            first = logits_of(model, inputs)[0, length:]
            ids = torch.cat([inputs["input_ids"][:, :length], other[None]], dim=1)
            second = logits_of(model, {**inputs, "input_ids": ids})[0, length:]
        torch.testing.assert_close(logits[layer], torch.cat([first, second[1:]]), **TOLERANCE)


@pytest.mark.parametrize("row", [0, 2], ids=["one image", "two images"])
@pytest.mark.parametrize("name", SHARING)
def test_branches_equal_texts_alone(model_of, name, row):
    check_branches(FAMILIES[name], model_of(name), row)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_shares_or_gives_the_reason(model_of, name):
    family, model = FAMILIES[name], model_of(name)
    for row, parts in enumerate(family.rows):
        if 0 not in parts or parts[-1] < 2:
            continue
        with suppress(CannotShareError):
            check_branches(family, model, row)


@pytest.mark.parametrize("name", sorted(REFUSING))
def test_models_whose_rows_depend_on_more_are_refused(model_of, name):
    family, model = FAMILIES[name], model_of(name)
    inputs, length, tail = example(family, model)

    def run():
        shared = SharedPrefix(model, inputs, length, {})
        list(shared.run([two_texts(tail)[1]], [0, 1]))

    with pytest.raises(CannotShareError, match=REFUSING[name]), torch.no_grad():
        run()


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_kinds_of_attention(attention):
    model = deep_insert(FAMILIES["llava"].model(attention=attention))
    if attention == "eager":
        check_branches(FAMILIES["llava"], model, 2)
    else:
        with pytest.raises(CannotShareError, match="flex_attention"):
            check_branches(FAMILIES["llava"], model, 2)


def test_sliding_windows_are_measured_in_the_full_sequence():
    """The window is shorter than the prefix, so that texts do not attend to its beginning."""
    windowed = {"model_type": "mistral", "sliding_window": 4, **TEXT}
    config = LlavaConfig(text_config=windowed, vision_config=CLIP, image_token_id=PLACEHOLDER)
    family = replace(FAMILIES["llava"], build=lambda: LlavaForConditionalGeneration(config))
    check_branches(family, deep_insert(family.model()), 2)


def test_leading_texts_are_computed_once_and_change_nothing(model_of):
    family, model = FAMILIES["llava"], model_of("llava")
    inputs, length, tail = example(family, model)
    texts: dict = {}
    runs = []
    for stored_texts in (texts, texts, {}):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            shared = SharedPrefix(model, inputs, length, stored_texts)
        runs.append((counter.get_total_flops(), shared))
    assert runs[1][0] < runs[0][0] == runs[2][0]
    assert len(texts) == 1
    states = [
        torch.stack([states for *_, states in shared.run([two_texts(tail)[1]], [0, 2])]) for _, shared in runs
    ]
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_layers_computed_together_change_no_bit(model_of):
    model = model_of("llava")
    inputs, length, tail = example(FAMILIES["llava"], model)
    branches = [two_texts(tail)[1], two_texts(tail.flip(0))[1]]

    def states_at(layers):
        with torch.no_grad():
            shared = SharedPrefix(model, inputs, length, {})
            return {(layer, index): states for layer, index, states in shared.run(branches, layers)}

    states_at_all = states_at([0, 1, 2, 3, 4])
    for layers in ([0], [4], [2, 3]):
        for key, states in states_at(layers).items():
            assert torch.equal(states, states_at_all[key])


def test_a_model_is_unchanged_afterwards_also_after_an_error(model_of):
    model = model_of("llava")
    inputs, length, tail = example(FAMILIES["llava"], model)
    before = logits_of(model, inputs)
    with torch.no_grad():
        shared = SharedPrefix(model, inputs, length, {})
        list(shared.run([two_texts(tail)[1]], [0, 2]))
        owner = torch.zeros(1, dtype=torch.long)
        mask_of_one = torch.ones(1, 1, 1, dtype=torch.bool)
        wrong = Branches(owner, tail[None], torch.arange(len(tail))[None], mask_of_one)
        with pytest.raises((RuntimeError, ValueError)):
            list(shared.run([wrong], [2]))
        with pytest.raises(CannotShareError, match="last multimodal token"):
            SharedPrefix(model, inputs, length - 1, {})
    assert torch.equal(logits_of(model, inputs), before)


def test_the_work_is_what_the_count_allows():
    """The features run through N (N + 1) / 2 layers for all insert layers, however many texts there are."""
    from deepinsert.controller.performance.random_models import IMAGE_TOKEN, build_bench_model

    model = deep_insert(build_bench_model("bench-tiny"))
    layers, patches = 4, 64
    ids = torch.cat([torch.tensor([1, 2]), torch.full((patches,), IMAGE_TOKEN), torch.arange(3, 9)])[None]
    inputs = {"input_ids": ids, "pixel_values": torch.rand(1, 3, 32, 32)}
    rows: list[int] = []
    for layer in model.model.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    with torch.no_grad():
        shared = SharedPrefix(model, inputs, 2 + patches, {})
        tail = ids[0, 2 + patches :]
        for copies in (1, 3):
            rows.clear()
            branches = [two_texts(tail)[1]] * copies
            list(shared.run(branches, range(layers)))
            features = [count for count in rows if count == patches]
            assert len(features) == layers * (layers + 1) // 2
            # Text alone runs through the layers below the deepest insert layer, then once per insert layer.
            words = copies * (layers - 1 + layers * (layers + 1) // 2)
            assert len(rows) - len(features) == words
