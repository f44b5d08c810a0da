"""The promises of the forward with a variable insert layer, for every model family, at a small size.

`test_insertion.py` and its neighbours try a few families in every shape of use. This file tries every family
in the shapes that differ between families. `make models` writes `docs/models.md` from a run of it.
"""

from __future__ import annotations

import copy

import pytest
import torch
from batches import depths_of
from reference import reference_logits
from zoo import (
    FAMILIES,
    REFUSED,
    Family,
    assert_close,
    logits_of,
    skip_here,
    skip_where_stock_differs,
    skipping_what_is_missing,
)

from deepinsert.backbones import UnsupportedModelError, deep_insert, insert_at, remove_deep_insert
from deepinsert.backbones.families import find_stack


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def stock(family):
    return family.model()


@pytest.fixture(scope="module")
def inserted(stock):
    with skipping_what_is_missing():
        return deep_insert(copy.deepcopy(stock), 0)


@pytest.fixture(autouse=True)
def skip_what_the_stock_model_cannot(request):
    if "family" in request.fixturenames:
        request.getfixturevalue("inserted")
        name = request.function.__name__.removeprefix("test_")
        family = request.getfixturevalue("family")
        if name in family.without:
            pytest.skip(family.without[name])


def layers_of(model):
    """Return the decoder layers of a model."""
    return find_stack(model).layers


@pytest.mark.parametrize("padding", ["left", "right"])
def test_layer_0_is_stock(family, stock, inserted, padding):
    inputs = family.batch(stock, padding=padding)
    assert torch.equal(logits_of(inserted, inputs), logits_of(stock, inputs))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_reference(family, stock, inserted, padding):
    """Every insert layer gives the logits of the stock model with multimodal tokens masked, row by row."""
    plain = family.model(attention="eager")
    inputs = family.batch(stock, padding=padding)
    largest_change = 0.0
    for layer in range(family.deepest + 1):
        with insert_at(inserted, layer):
            logits = logits_of(inserted, inputs)
        for row in range(len(family.rows)):
            alone = family.batch(stock, padding=padding, only=row)
            with torch.no_grad():
                expected = reference_logits(
                    plain, layers_of(plain), alone, layer, family.multimodal(alone["input_ids"])[0]
                )
            real = inputs["attention_mask"][row].bool()
            assert_close(logits[row][real], expected)
            change = float((expected - logits_of(stock, alone)[0]).abs().max())
            largest_change = max(largest_change, change)
    assert largest_change > 0.03, "a later insert layer must change the logits, or this test shows nothing"


def test_one_layer_per_row(family, stock, inserted):
    inputs = family.batch(stock)
    depths = depths_of(family, len(family.rows))
    with insert_at(inserted, depths):
        mixed = logits_of(inserted, inputs)
    for row, depth in enumerate(depths):
        with insert_at(inserted, depth):
            alone = logits_of(inserted, family.batch(stock, only=row))[0]
        real = inputs["attention_mask"][row].bool()
        assert_close(mixed[row][real], alone)


@pytest.mark.parametrize("per_row", [False, True], ids=["one layer", "layer per row"])
def test_generation(family, stock, inserted, per_row):
    """Generation with the cache and without it gives the same tokens."""
    depths = depths_of(family, len(family.rows))
    cases = [(family.batch(stock), depths if per_row else depths[0])]
    if family.generates_alone:
        cases = [(family.batch(stock, only=row), depth) for row, depth in enumerate(depths)]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for inputs, depth in cases:
        skip_where_stock_differs(inserted, inputs, {"use_cache": False}, **options)
        with insert_at(inserted, depth), torch.no_grad():
            tokens = [inserted.generate(**inputs, **options, use_cache=cached) for cached in (True, False)]
        assert torch.equal(*tokens)


def test_short_cache(family, stock, inserted):
    """Layers below the insert layer hold no key of a multimodal token."""
    inputs = family.batch(stock, only=0)
    depth = min(family.deepest, len(layers_of(stock)) - 1)
    with insert_at(inserted, depth), torch.no_grad():
        output = inserted(**inputs, use_cache=True)
    cache = getattr(output, "language_model_outputs", output).past_key_values
    total = inputs["input_ids"].shape[1]
    text = total - int(family.multimodal(inputs["input_ids"]).sum())
    # A recurrent layer holds no keys.
    attending = {
        index: layer for index, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None
    }
    assert attending
    for index, layer in attending.items():
        # A sliding layer holds the keys of its window that the next position attends to.
        most = getattr(layer, "sliding_window", total + 1) - 1
        assert layer.keys.shape[-2] == min(most, text if index < depth else total)
        assert layer.get_seq_length() == total


def test_gradients(family, stock):
    """The loss has the reference's gradient for every parameter, at the middle insert layer."""
    inserted = deep_insert(copy.deepcopy(stock), 2).requires_grad_(True)
    plain = family.model(attention="eager").requires_grad_(True)
    inputs = family.batch(stock, only=0)
    multimodal = family.multimodal(inputs["input_ids"])[0]
    target = inputs["input_ids"][0][1:]
    loss = torch.nn.functional.cross_entropy
    loss(inserted(**inputs, use_cache=False).logits[0, :-1], target).backward()
    loss(reference_logits(plain, layers_of(plain), inputs, 2, multimodal)[:-1], target).backward()
    compared = 0
    for (name, weight), expected in zip(inserted.named_parameters(), plain.parameters(), strict=True):
        gradients = (weight.grad, expected.grad)
        if weight.grad is None or expected.grad is None:
            assert not any(gradient is not None and gradient.any() for gradient in gradients), name
            continue
        torch.testing.assert_close(*gradients, atol=5e-5, rtol=2e-3, msg=name)
        compared += 1
    assert compared > 4 * len(layers_of(stock))


def test_checkpoint(family, stock, tmp_path):
    """Stock code saves and loads a checkpoint with all keys, the same logits and the same insert layer."""
    model = deep_insert(copy.deepcopy(stock), min(3, family.deepest))
    model.save_pretrained(tmp_path)
    loaded, report = type(stock).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    inputs = family.batch(stock)
    try:
        logits_of(loaded.eval(), inputs)
    except Exception as error:
        skip_here(f"the stock model fails once it is loaded: {type(error).__name__}: {error}")
    assert torch.equal(logits_of(deep_insert(loaded), inputs), logits_of(model, inputs))


def test_removal(family, stock):
    model = remove_deep_insert(deep_insert(copy.deepcopy(stock), min(3, family.deepest)))
    inputs = family.batch(stock)
    assert torch.equal(logits_of(model, inputs), logits_of(stock, inputs))


def test_deepest_layer(family, inserted):
    with pytest.raises(ValueError, match=f"to {family.deepest}, "), insert_at(inserted, family.deepest + 1):
        pass


@pytest.mark.parametrize("name", list(REFUSED))
def test_refusal(name):
    model = REFUSED[name].model()
    with pytest.raises(UnsupportedModelError, match=REFUSED[name].reason):
        deep_insert(model, 1)
