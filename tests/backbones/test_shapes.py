"""Every shape of use on every model family: the cross product that `make test-slow` runs.

`test_models.py` tries every family in the shapes that differ between families, `test_insertion.py` and
`test_caches.py` a few families in every shape; here all are crossed. A promise that the stock model does not
keep either, or for which it raises, is skipped with what the stock model did. Contrastive search has left
`transformers` 5 (it is code on the hub, behind `custom_generate`), so it cannot be tried without a network.
"""

from __future__ import annotations

import copy
import inspect
import threading
import warnings

import pytest
import torch
from reference import reference_logits
from transformers import DynamicCache
from zoo import FAMILIES, Family, logits_of

from deepinsert import UnsupportedCacheError
from deepinsert.backbones import deep_insert, insert_at, insert_layer_of, set_insert_layer
from deepinsert.backbones.families import find_stack

pytestmark = pytest.mark.slow

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
OPTIONS = {
    "max_new_tokens": 4,
    "do_sample": False,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def stock(family):
    return family.model()


@pytest.fixture(scope="module")
def inserted(stock):
    return deep_insert(copy.deepcopy(stock), 0)


def deep(family):
    """A layer below which several layers are short, and at which some layer is not."""
    return min(family.deepest, 3)


def held(promise, stock, inserted, layers, refused=None):
    """`promise(model)` raises where it is broken. What the stock model does not keep either is skipped, and
    a cache that is refused with a message in which `refused` is found."""
    try:
        with insert_at(inserted, layers):
            promise(inserted)
    except Exception as ours:
        if isinstance(ours, UnsupportedCacheError) and refused is not None and refused in str(ours):
            pytest.skip(f"refused: {ours}")
        try:
            promise(stock)
        except Exception as theirs:
            said = str(theirs).strip().split("\n")[0][:160]
            pytest.skip(f"nor the stock model: {type(theirs).__name__}: {said}")
        raise ours


def generate(model, inputs, **options):
    torch.manual_seed(7)
    with torch.no_grad():
        return model.generate(**inputs, **(OPTIONS | options))


def same(found, expected):
    """The same tokens, from the same logits: by tokens alone a promise may seem kept by chance."""
    assert torch.equal(found.sequences, expected.sequences), "other tokens"
    assert len(found.logits) == len(expected.logits), "another number of steps"
    for mine, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def batches(family, stock):
    """Inputs and insert layers, one a row. For beams `transformers` repeats images one by one, so rows have
    one at most; a family whose padded batches the stock model gets wrong has its rows one by one."""
    rows = [_at_most_one_image(row) for row in family.rows]
    depths = [(2, family.deepest, 1, family.deepest - 1)[row % 4] for row in range(len(rows))]
    if family.generates_alone:
        return [(family.batch(stock, rows, only=row), depth) for row, depth in enumerate(depths)]
    return [(family.batch(stock, rows), depths)]


def _at_most_one_image(row):
    first = row.index(0) if 0 in row else len(row)
    return tuple(part for place, part in enumerate(row) if part or place == first)


STRATEGIES = {
    "beams": {"num_beams": 2},
    "sampled": {"do_sample": True, "top_k": 8},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_generation(family, stock, inserted, strategy):
    """One layer per row; with the cache and without it, the same tokens."""
    if "generation" in family.without:
        pytest.skip(family.without["generation"])
    for inputs, layers in batches(family, stock):

        def promise(model, inputs=inputs):
            tokens = [
                generate(model, inputs, **STRATEGIES[strategy], use_cache=cached) for cached in (True, False)
            ]
            same(*tokens)

        held(promise, stock, inserted, layers)


def test_static_cache(family, stock, inserted):
    for inputs, layers in batches(family, stock):

        def promise(model, inputs=inputs):
            static = generate(model, inputs, cache_implementation="static")
            same(static, generate(model, inputs))

        held(promise, stock, inserted, layers, refused="StaticIndexedLayer")


@pytest.mark.parametrize("size", [2, 5])
def test_chunked_prefill(family, stock, inserted, size):
    inputs = family.batch(stock, only=0)

    def promise(model):
        chunked = generate(model, inputs, prefill_chunk_size=size)
        same(chunked, generate(model, inputs))

    held(promise, stock, inserted, deep(family))


def test_prompt_lookup(family, stock, inserted):
    inputs = family.batch(stock, only=0)

    def promise(model):
        found = generate(model, inputs, prompt_lookup_num_tokens=3, max_new_tokens=8)
        same(found, generate(model, inputs, max_new_tokens=8))

    held(promise, stock, inserted, deep(family))


def test_assistant(family, stock, inserted):
    """The assistant is the same model, at another insert layer."""
    inputs = family.batch(stock, only=0)
    assistant = copy.deepcopy(inserted)
    set_insert_layer(assistant, 1)
    # As wrong as often, for the stock model.
    other = family.model(seed=1)

    def promise(model):
        helper = assistant if model is inserted else other
        assisted = generate(model, inputs, assistant_model=helper, max_new_tokens=8)
        same(assisted, generate(model, inputs, max_new_tokens=8))

    held(promise, stock, inserted, deep(family))


def stack_call(model, inputs):
    """What a stock model calls its decoder stack with, by name."""
    stack, seen = find_stack(model), {}
    names = list(inspect.signature(stack.forward).parameters)

    def note(module, args, kwargs):
        seen.update(dict(zip(names, args, strict=False)) | kwargs)

    hook = stack.register_forward_pre_hook(note, with_kwargs=True)
    try:
        logits_of(model, inputs)
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize("then", [(4,), (2, 0, 3)], ids=["text", "new image"])
def test_second_turn(family, stock, inserted, then):
    """On a kept cache, as in the whole conversation."""
    conversation = (3, 0, 4, *then)
    whole = family.batch(stock, [conversation])
    said = family.batch(stock, [conversation[:3]])["input_ids"].shape[1]
    total = whole["input_ids"].shape[1]
    first = family.batch(stock, [conversation[:3]])
    # Images are seeded by their place in the row.
    new = [place for place, part in enumerate(conversation) if part == 0 and place > 2]
    second = dict(family.media(stock, [new]).inputs) if new else {}
    for name, value in whole.items():
        if value.shape == (1, total) and name != "attention_mask":
            second[name] = value[:, said:]
    second["attention_mask"] = whole["attention_mask"]
    positions = stack_call(stock, whole).get("position_ids")
    if positions is not None and "position_ids" in inspect.signature(stock.forward).parameters:
        second["position_ids"] = positions[..., said:]

    def promise(model):
        expected = logits_of(model, whole, use_cache=False)
        cache = DynamicCache(config=model.config.get_text_config())
        turns = [logits_of(model, turn, past_key_values=cache, use_cache=True) for turn in (first, second)]
        torch.testing.assert_close(torch.cat(turns, dim=1), expected, **TOLERANCE)

    held(promise, stock, inserted, deep(family))


def test_embeddings(family, stock, inserted):
    """`inputs_embeds` with their features in place, and a mask that says where."""
    inputs = family.batch(stock, only=0)
    ids = inputs["input_ids"]
    call = stack_call(stock, inputs)
    embeds = {"inputs_embeds": call.get("inputs_embeds"), "attention_mask": inputs["attention_mask"]}
    if call.get("position_ids") is not None:
        embeds["position_ids"] = call["position_ids"]

    def promise(model):
        expected = logits_of(model, inputs)
        multimodal = family.multimodal(ids)
        with insert_at(inserted, deep(family), multimodal_mask=multimodal):
            torch.testing.assert_close(logits_of(model, embeds), expected, **TOLERANCE)

    held(promise, stock, inserted, deep(family))


def test_gradient_checkpointing(family, stock):
    inputs = family.batch(stock)

    def promise(insert):
        gradients = []
        for checkpointing in (False, True):
            model = copy.deepcopy(stock).train().requires_grad_(True)
            if insert:
                deep_insert(model, min(2, family.deepest))
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            torch.manual_seed(0)
            logits = model(**inputs, use_cache=False).logits
            logits[inputs["attention_mask"].bool()].square().mean().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3, msg=name)

    _held_with_and_without(promise)


def _held_with_and_without(promise):
    """`promise(insert)` with an insert layer; skipped where it is broken without one as well."""
    try:
        promise(True)
    except Exception as ours:
        try:
            promise(False)
        except Exception as theirs:
            said = str(theirs).strip().split("\n")[0][:160]
            pytest.skip(f"nor the stock model: {type(theirs).__name__}: {said}")
        raise ours


def test_lora(family, stock):
    """Wrapped by PEFT before or after: the same, and what merging gives."""
    from peft import LoraConfig, get_peft_model

    inputs = family.batch(stock)
    layer = deep(family)
    config = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}

    def wrap(model):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_peft_model(model, LoraConfig(**config)).eval()

    def promise(insert):
        before = wrap(copy.deepcopy(stock))
        if insert:
            deep_insert(before, layer)
        found = logits_of(before, inputs)
        if insert:
            after = wrap(deep_insert(copy.deepcopy(stock), layer))
            assert torch.equal(logits_of(after, inputs), found)
        merged = before.merge_and_unload()
        torch.testing.assert_close(logits_of(merged, inputs), found, atol=1e-3, rtol=1e-3)
        if insert:
            assert insert_layer_of(merged) == layer
            with insert_at(merged, 0):
                assert not torch.allclose(logits_of(merged, inputs), found, atol=1e-2)

    _held_with_and_without(promise)


def test_copy(family, stock, inserted):
    inputs = family.batch(stock)
    with insert_at(inserted, 1):
        expected = logits_of(inserted, inputs)
    other = copy.deepcopy(inserted)
    set_insert_layer(other, 1)
    assert insert_layer_of(inserted) == 0
    assert torch.equal(logits_of(other, inputs), expected)
    assert torch.equal(logits_of(inserted, inputs), logits_of(stock, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(family, stock, dtype):
    """As near to the reference in float32 as the reference in half precision is."""
    layer = deep(family)
    exact = family.model(attention="eager")
    plain, mine = copy.deepcopy(exact).to(dtype), deep_insert(copy.deepcopy(stock).to(dtype), layer)
    inputs = family.batch(stock, only=0)
    half = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    multimodal = family.multimodal(inputs["input_ids"])[0]
    with torch.no_grad():
        expected = reference_logits(exact, find_stack(exact).layers, inputs, layer, multimodal)
        try:
            near = reference_logits(plain, find_stack(plain).layers, half, layer, multimodal).float()
        except RuntimeError as error:
            pytest.skip(f"nor the stock model: {str(error).strip().splitlines()[0][:160]}")
    got = logits_of(mine, half)[0].float()
    error, allowed = (got - expected).norm(), (near - expected).norm()
    step = torch.finfo(dtype).eps * expected.norm()
    assert error <= 2 * allowed + 4 * step, f"off by {error:.3g}, the reference by {allowed:.3g}"


def test_without_a_cache(family, stock, inserted):
    inputs = family.batch(stock)
    layers = [(2, family.deepest, 1, family.deepest - 1)[row % 4] for row in range(len(family.rows))]
    with insert_at(inserted, layers):
        with_cache, without = (logits_of(inserted, inputs, use_cache=cached) for cached in (True, False))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(without[real], with_cache[real], **TOLERANCE)


def test_text_only(family, stock, inserted):
    """Nothing waits: the stock model's numbers."""
    inputs = family.batch(stock, [(5,), (3,)])
    try:
        expected = logits_of(stock, inputs)
    except Exception as error:
        pytest.skip(f"nor the stock model: {type(error).__name__}: {error}")
    real = inputs["attention_mask"].bool()
    with insert_at(inserted, deep(family)):
        torch.testing.assert_close(logits_of(inserted, inputs)[real], expected[real], **TOLERANCE)


def test_two_threads(family, stock, inserted):
    inputs = family.batch(stock)
    layers = (1, family.deepest)
    expected, got = [], [[], []]
    for layer in layers:
        with insert_at(inserted, layer):
            expected.append(logits_of(inserted, inputs))

    def work(place):
        with insert_at(inserted, layers[place]):
            for _ in range(2):
                got[place].append(logits_of(inserted, inputs))

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, results in enumerate(got):
        assert len(results) == 2
        # Where memory lies decides a last bit, in the stock model too.
        for result in results:
            torch.testing.assert_close(result, expected[place], **TOLERANCE)
