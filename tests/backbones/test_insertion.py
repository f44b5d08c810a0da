"""The promises of the forward with a variable insert layer, one test each, for five model families."""

from __future__ import annotations

import copy

import pytest
import torch
from batches import DEPTHS, ROWS, real_logits, reference_of
from transformers.cache_utils import DynamicLayer
from zoo import FAMILIES, LAYERS, forget_the_last_batch, logits_of

from deepinsert.backbones import deep_insert, insert_at, insert_layer_of, remove_deep_insert, set_insert_layer


@pytest.mark.parametrize("padding", ["left", "right"])
def test_insert_layer_0_is_stock_bit_for_bit(family, stock, inserted, padding):
    inputs = family.batch(stock, ROWS, padding)
    assert torch.equal(logits_of(inserted, inputs), logits_of(stock, inputs))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_equal_a_plain_loop_over_layers(family, stock, inserted, attention, padding):
    eager_stock = family.model(attention="eager")
    inserted.set_attn_implementation(attention)
    inputs = family.batch(stock, ROWS, padding)
    largest_change = 0.0
    for layer in range(LAYERS + 1):
        with insert_at(inserted, layer):
            logits = logits_of(inserted, inputs)
        for row in range(len(ROWS)):
            real = inputs["attention_mask"][row].bool()
            with torch.no_grad():
                expected = reference_of(eager_stock, family.batch(stock, ROWS, only=row), family, layer)
            torch.testing.assert_close(logits[row][real], expected, atol=1e-5, rtol=1e-5)
        largest_change = max(largest_change, float((logits - logits_of(stock, inputs)).abs().max()))
    inserted.set_attn_implementation("sdpa")
    assert largest_change > 0.1, "a later insert layer must change the logits, or this test shows nothing"


@pytest.mark.parametrize("padding", ["left", "right"])
def test_one_insert_layer_per_row_equals_each_row_alone(family, stock, inserted, padding):
    inputs = family.batch(stock, ROWS, padding)
    with insert_at(inserted, DEPTHS):
        mixed = [real_logits(inserted, inputs, row) for row in range(len(ROWS))]
    for row, depth in enumerate(DEPTHS):
        with insert_at(inserted, depth):
            alone = logits_of(inserted, family.batch(stock, ROWS, only=row))[0]
        torch.testing.assert_close(mixed[row], alone, atol=1e-5, rtol=1e-5)


def test_rows_that_are_images_alone(family, stock, inserted):
    """Below the insert layer such a batch has no row at all."""
    eager_stock = family.model(attention="eager")
    images = [(0,), (0,)]
    inputs = family.batch(stock, images, "left")
    with insert_at(inserted, 3):
        logits = logits_of(inserted, inputs)
    for row in range(2):
        with torch.no_grad():
            expected = reference_of(eager_stock, family.batch(stock, images, only=row), family, 3)
        real = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(logits[row][real], expected, atol=1e-5, rtol=1e-5)


def test_bf16_is_as_near_to_float32_as_the_reference_in_bf16():
    family = FAMILIES["llava"]
    exact = family.model(attention="eager")
    half, model = copy.deepcopy(exact).bfloat16(), deep_insert(family.model().bfloat16(), 3)
    inputs = family.batch(exact, [(3, 0, 4)])
    half_inputs = inputs | {"pixel_values": inputs["pixel_values"].bfloat16()}
    with torch.no_grad():
        expected = reference_of(exact, inputs, family, 3)
        half_reference = reference_of(half, half_inputs, family, 3)
    logits = logits_of(model, half_inputs)[0]
    assert logits.dtype == torch.bfloat16
    step = torch.finfo(torch.bfloat16).eps * expected.norm()
    assert (logits - expected).norm() <= 2 * (half_reference - expected).norm() + step


def test_a_batch_without_images_has_the_stock_logits(family, stock, inserted):
    inputs = family.batch(stock, [(5,), (5,)])
    set_insert_layer(inserted, 3)
    forget_the_last_batch(inserted)
    with torch.no_grad():
        output = inserted(**inputs, use_cache=True)
    assert torch.equal(output.logits, logits_of(stock, inputs))
    assert {type(layer) for layer in output.past_key_values.layers} == {DynamicLayer}


def test_positions_are_those_of_the_full_sequence(family, stock, inserted):
    inputs = family.batch(stock, [(3, 0, 4)], "left")
    tables_of = {}
    for model in (stock, inserted):
        tables = []
        hooks = [
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, tables=tables: tables.append(kwargs["position_embeddings"][0]),
                with_kwargs=True,
            )
            for layer in model.get_decoder().layers
        ]
        with insert_at(inserted, 2):
            logits_of(model, inputs)
        tables_of[model] = tables
        for hook in hooks:
            hook.remove()
    text = ~family.multimodal(inputs["input_ids"])[0]
    full = tables_of[stock][0]
    assert all(torch.equal(table, full[..., text, :]) for table in tables_of[inserted][:2])
    assert all(torch.equal(table, full) for table in tables_of[inserted][2:])


def test_hidden_states_have_full_length(family, stock, inserted):
    inputs = family.batch(stock, ROWS, "right")
    with insert_at(inserted, 3), torch.no_grad():
        states = inserted(**inputs, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(*inputs["input_ids"].shape, 32)] * (LAYERS + 1)
    for row, ids in enumerate(inputs["input_ids"]):
        multimodal = family.multimodal(ids)
        # A waiting multimodal row is as it entered layer 0.
        assert torch.equal(states[3][row, multimodal], states[0][row, multimodal])
        text = ~multimodal & inputs["attention_mask"][row].bool()
        assert not torch.allclose(states[3][row, text], states[0][row, text])


def test_loss_and_gradients_equal_the_reference(family, stock):
    inserted, plain = deep_insert(copy.deepcopy(stock), 3), copy.deepcopy(stock)
    plain.set_attn_implementation("eager")
    inputs = family.batch(stock, ROWS[:3], "right")
    for model in (inserted, plain):
        model.requires_grad_(True)
    logits = inserted(**inputs, use_cache=False).logits
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        target = inputs["input_ids"][row][real][1:]
        torch.nn.functional.cross_entropy(logits[row][real][:-1], target).backward(retain_graph=True)
        reference = reference_of(plain, family.batch(stock, ROWS[:3], only=row), family, 3)
        torch.nn.functional.cross_entropy(reference[:-1], target).backward()
    compared = 0
    for (name, weight), expected in zip(inserted.named_parameters(), plain.parameters(), strict=True):
        assert (weight.grad is None) == (expected.grad is None), name
        if weight.grad is not None:
            torch.testing.assert_close(weight.grad, expected.grad, atol=2e-5, rtol=1e-3, msg=name)
            compared += 1
    assert compared > 6 * LAYERS


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(family, stock, use_reentrant):
    inputs = family.batch(stock, ROWS, "right")
    gradients = []
    for checkpointing in (False, True):
        model = deep_insert(copy.deepcopy(stock), 3).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(**inputs, use_cache=False).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_removal_restores_the_stock_model(family, stock):
    model = deep_insert(copy.deepcopy(stock), 3)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert type(model) is type(stock)
    remove_deep_insert(model)
    inputs = family.batch(stock, ROWS, "left")
    assert torch.equal(logits_of(model, inputs), logits_of(stock, inputs))
    for module, stock_module in zip(model.modules(), stock.modules(), strict=True):
        assert type(module) is type(stock_module)
        assert vars(module).keys() == vars(stock_module).keys()
        assert len(module._forward_hooks) == len(stock_module._forward_hooks)
        assert len(module._forward_pre_hooks) == len(stock_module._forward_pre_hooks)
    assert not hasattr(model.config, "deepinsert")
    with pytest.raises(ValueError, match="call deep_insert"):
        insert_layer_of(model)
