"""Under `torch.compile`, decoding with a static cache is one graph, compiled once; the rest runs eagerly."""

from __future__ import annotations

import pytest
import torch
from batches import DEPTHS, LONGER_ROWS
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig, DynamicCache, StaticCache
from zoo import FAMILIES, logits_of

from deepinsert.backbones import deep_insert, insert_at

SLOTS = 40
"""The length of the static caches."""


@pytest.fixture(params=["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def family(request):
    torch.compiler.reset()
    yield FAMILIES[request.param]
    torch.compiler.reset()


@pytest.fixture
def model(family):
    return deep_insert(family.model(), 0)


def decode(forward, model, inputs, layers, steps):
    """Return the logits of greedy steps behind an eager prefill, with a static cache.

    Args:
        forward: The model, or its compiled form, which computes the steps.
        model: The model, which computes the prefill.
        inputs: Its inputs.
        layers: The insert layer, or one per row.
        steps: The number of steps.
    """
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=SLOTS)
    batch, length = inputs["input_ids"].shape
    # The mask is as long as the cache from the start, since shapes that grow would recompile.
    future = torch.ones(batch, SLOTS - length, dtype=torch.long)
    mask = torch.cat([inputs["attention_mask"], future], dim=1)
    step_logits = []
    with insert_at(model, layers), torch.no_grad():
        model.model.rope_deltas = None
        logits = model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1:]
        for step in range(steps):
            position = torch.full((batch, 1), length + step)
            words = {"input_ids": logits.argmax(-1), "attention_mask": mask, "position_ids": position}
            logits = forward(**words, past_key_values=cache, use_cache=True).logits
            step_logits.append(logits)
    return torch.cat(step_logits, dim=1)


@pytest.mark.parametrize("layers", [3, DEPTHS], ids=["one layer", "layer per row"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_decoding_is_one_graph_compiled_once(family, model, layers, backend):
    inputs = family.batch(model, LONGER_ROWS)
    expected = decode(model, model, inputs, layers, 6)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    assert counter.frame_count == 0
    logits = decode(compiled, model, inputs, layers, 2)
    torch.testing.assert_close(logits, expected[:, :2], atol=1e-4, rtol=1e-4)
    warm_count = counter.frame_count
    with torch.compiler.set_stance("fail_on_recompile"):
        logits = decode(compiled, model, inputs, layers, 6)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == warm_count


def test_generate_compiles_by_itself(family, model):
    """On the CPU, `generate` compiles as it does with a static cache on a GPU."""
    inputs = family.batch(model, LONGER_ROWS)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    compiling = CompileConfig(fullgraph=True, backend="eager")
    compiling._compile_all_devices = True
    with insert_at(model, DEPTHS), torch.no_grad():
        expected = model.generate(**inputs, **options)
        tokens = model.generate(**inputs, **options, compile_config=compiling)
    assert torch.equal(tokens, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("layers", [3, DEPTHS], ids=["one layer", "layer per row"])
def test_a_compiled_prefill_leaves_the_graph(family, model, layers):
    """Rows are chosen by value, so the stack runs eagerly; the shapes of a growing cache change as well."""
    inputs = family.batch(model, LONGER_ROWS)
    compiled = torch.compile(model, backend="eager")
    length = inputs["input_ids"].shape[1]
    step = {"input_ids": torch.full((4, 1), 30), "position_ids": torch.full((4, 1), length)}
    step["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(4, 1, dtype=torch.long)], dim=1)
    logits = []
    with insert_at(model, layers):
        for forward in (model, compiled):
            cache = DynamicCache(config=model.config.get_text_config())
            first = logits_of(forward, inputs, past_key_values=cache, use_cache=True)
            then = logits_of(forward, step, past_key_values=cache, use_cache=True)
            logits.append(torch.cat([first, then], dim=1))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)


def test_layer_0_compiles_as_the_stock_model_does():
    torch.compiler.reset()
    family = FAMILIES["llava"]
    model = deep_insert(family.model(), 0)
    inputs = {name: value for name, value in family.batch(model, [(6,), (6,)]).items()}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(logits_of(compiled, inputs, use_cache=False), logits_of(model, inputs))


def test_compiled_layers(family, model):
    """Compiling each layer keeps the layers of prefill and training in compiled code."""
    inputs = family.batch(model, LONGER_ROWS)
    with insert_at(model, 2):
        expected = logits_of(model, inputs)
        for layer in model.get_decoder().layers:
            layer.compile(backend="eager")
        logits = logits_of(model, inputs)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
