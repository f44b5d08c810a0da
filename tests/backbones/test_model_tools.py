"""Checkpoints, PEFT, copies and threads work on a model with an insert layer as on its stock model."""

from __future__ import annotations

import copy
import threading
from importlib.util import find_spec

import pytest
import torch
from batches import ROWS
from zoo import logits_of, skip_here

from deepinsert.backbones import deep_insert, insert_at, insert_layer_of, set_insert_layer


def test_the_insert_layer_travels_with_the_checkpoint(family, stock, tmp_path):
    model = deep_insert(copy.deepcopy(stock), 4)
    model.save_pretrained(tmp_path)
    loaded, report = type(stock).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    deep_insert(loaded)
    assert insert_layer_of(loaded) == 4
    inputs = family.batch(stock, ROWS, "left")
    assert torch.equal(logits_of(loaded.eval(), inputs), logits_of(model, inputs))


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_peft_before_and_after(family, stock, wrapped_first):
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(stock)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    if wrapped_first:
        model = deep_insert(get_peft_model(model, config), 3)
    else:
        model = get_peft_model(deep_insert(model, 3), config)
    model.eval()
    inputs = family.batch(stock, ROWS, "left")
    adapted = logits_of(model, inputs)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, inputs), adapted, atol=1e-5, rtol=1e-4)
    assert insert_layer_of(merged) == 3
    with insert_at(merged, 0):
        assert not torch.allclose(logits_of(merged, inputs), adapted, atol=1e-3)


def test_peft_with_trained_embeddings(family, stock):
    """PEFT replaces the embedding module by a copy of its own."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = get_peft_model(deep_insert(copy.deepcopy(stock), 3), config).eval()
    stacks = [
        module for module in model.modules() if type(module).__name__ == type(stock.get_decoder()).__name__
    ]
    assert len(stacks) == 1
    plain = deep_insert(copy.deepcopy(stock), 3)
    for rows in (ROWS, [(5,), (3,)]):
        inputs = family.batch(stock, rows, "left")
        # Stock models that PEFT has wrapped also round otherwise on some processors, so bits may differ.
        logits, expected = logits_of(model, inputs), logits_of(plain, inputs)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_copy_and_its_original_do_not_share_a_layer(family, stock):
    original = deep_insert(copy.deepcopy(stock), 2)
    duplicate = copy.deepcopy(original)
    set_insert_layer(duplicate, 4)
    inputs = family.batch(stock, ROWS, "left")
    with insert_at(original, 4):
        at_four = logits_of(original, inputs)
    assert insert_layer_of(original) == 2
    assert torch.equal(logits_of(duplicate, inputs), at_four)
    del original
    assert torch.equal(logits_of(duplicate, inputs), at_four)


def test_threads_have_their_own_layers(family, stock, inserted):
    if find_spec("transformers.utils.output_capturing") is None:
        skip_here("the stock model hands threads each other's outputs, as to 5.1")
    inputs = family.batch(stock, ROWS, "left")
    expected = []
    for layer in range(4):
        with insert_at(inserted, layer):
            expected.append(logits_of(inserted, inputs))
    logits_of_layer = [[] for _ in expected]

    def work(layer):
        with insert_at(inserted, layer):
            for _ in range(5):
                logits_of_layer[layer].append(logits_of(inserted, inputs))

    threads = [threading.Thread(target=work, args=(layer,)) for layer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for layer, results in enumerate(logits_of_layer):
        assert len(results) == 5 and all(torch.equal(result, expected[layer]) for result in results)
