"""Every shape of use for every model family: the cross product that `make test-slow` runs.

`test_models.py` tries every family in the shapes that differ between families, and `test_insertion.py`,
`test_decoding.py` and `test_caches.py` try a few families in every shape. If the stock model does not keep a
promise either, the test is skipped with the stock model's error. `transformers` 5 has no contrastive search
(it is code on the hub, behind `custom_generate`), so it cannot be tried without a network.
"""

from __future__ import annotations

import copy
import inspect
import threading
import warnings

import pytest
import torch
from batches import depths_of
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


def deep_layer(family):
    """Return an insert layer below which several layers lack rows, and from which on some layer has all."""
    return min(family.deepest, 3)


def check(promise, stock, inserted, layers, refusal=None):
    """Check a promise, and skip the test if the stock model does not keep it either.

    Args:
        promise: A function of a model that raises an error if the promise is broken.
        stock: The stock model.
        inserted: The model with an insert layer.
        layers: Its insert layer, or one per row.
        refusal: A part of the message with which a cache may be refused; then the test is skipped too.
    """
    try:
        with insert_at(inserted, layers):
            promise(inserted)
    except Exception as error:
        if isinstance(error, UnsupportedCacheError) and refusal is not None and refusal in str(error):
            pytest.skip(f"refused: {error}")
        _skip_if_broken(promise, stock)
        raise


def _skip_if_broken(promise, argument):
    """Skip the test if `promise(argument)`, which tries the stock model, raises an error."""
    try:
        promise(argument)
    except Exception as error:
        first_line = str(error).strip().split("\n")[0][:160]
        pytest.skip(f"the stock model fails as well: {type(error).__name__}: {first_line}")


def generate(model, inputs, **options):
    """Return what `generate` returns with a fixed seed: tokens and logits."""
    torch.manual_seed(7)
    with torch.no_grad():
        return model.generate(**inputs, **(OPTIONS | options))


def assert_same(output, expected):
    """Compare tokens and logits of two generations: tokens alone may be equal by chance."""
    assert torch.equal(output.sequences, expected.sequences), "other tokens"
    assert len(output.logits) == len(expected.logits), "another number of steps"
    for logits, expected_logits in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)


def batches(family, stock):
    """Return batches of inputs with their insert layers, one per row.

    `transformers` repeats images one by one for beams, so a row has at most one image. A family for which the
    stock model computes padded batches wrongly gets one batch per row.
    """
    rows = [_at_most_one_image(row) for row in family.rows]
    depths = depths_of(family, len(rows))
    if family.generates_alone:
        return [(family.batch(stock, rows, only=row), depth) for row, depth in enumerate(depths)]
    return [(family.batch(stock, rows), depths)]


def _at_most_one_image(row):
    """Return the row without all images but the first."""
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
    """With one layer per row, generation with the cache and without it gives the same tokens."""
    if "generation" in family.without:
        pytest.skip(family.without["generation"])
    for inputs, layers in batches(family, stock):

        def promise(model, inputs=inputs):
            tokens = [
                generate(model, inputs, **STRATEGIES[strategy], use_cache=cached) for cached in (True, False)
            ]
            assert_same(*tokens)

        check(promise, stock, inserted, layers)


def test_static_cache(family, stock, inserted):
    for inputs, layers in batches(family, stock):

        def promise(model, inputs=inputs):
            static = generate(model, inputs, cache_implementation="static")
            assert_same(static, generate(model, inputs))

        check(promise, stock, inserted, layers, refusal="StaticIndexedLayer")


@pytest.mark.parametrize("size", [2, 5])
def test_chunked_prefill(family, stock, inserted, size):
    inputs = family.batch(stock, only=0)

    def promise(model):
        chunked = generate(model, inputs, prefill_chunk_size=size)
        assert_same(chunked, generate(model, inputs))

    check(promise, stock, inserted, deep_layer(family))


def test_prompt_lookup(family, stock, inserted):
    inputs = family.batch(stock, only=0)

    def promise(model):
        looked_up = generate(model, inputs, prompt_lookup_num_tokens=3, max_new_tokens=8)
        assert_same(looked_up, generate(model, inputs, max_new_tokens=8))

    check(promise, stock, inserted, deep_layer(family))


def test_assistant(family, stock, inserted):
    """The assistant is the same model, at another insert layer."""
    inputs = family.batch(stock, only=0)
    assistant = copy.deepcopy(inserted)
    set_insert_layer(assistant, 1)
    # For the stock model, an assistant that is often wrong as well.
    stock_assistant = family.model(seed=1)

    def promise(model):
        assistant_model = assistant if model is inserted else stock_assistant
        assisted = generate(model, inputs, assistant_model=assistant_model, max_new_tokens=8)
        assert_same(assisted, generate(model, inputs, max_new_tokens=8))

    check(promise, stock, inserted, deep_layer(family))


def stack_call(model, inputs):
    """Return the arguments with which a stock model calls its decoder stack, by name."""
    stack, call = find_stack(model), {}
    names = list(inspect.signature(stack.forward).parameters)

    def record(module, args, kwargs):
        call.update(dict(zip(names, args, strict=False)) | kwargs)

    hook = stack.register_forward_pre_hook(record, with_kwargs=True)
    try:
        logits_of(model, inputs)
    finally:
        hook.remove()
    return call


@pytest.mark.parametrize("then", [(4,), (2, 0, 3)], ids=["text", "new image"])
def test_second_turn(family, stock, inserted, then):
    """A second turn on a kept cache gives the logits of the whole conversation."""
    conversation = (3, 0, 4, *then)
    whole = family.batch(stock, [conversation])
    past = family.batch(stock, [conversation[:3]])["input_ids"].shape[1]
    total = whole["input_ids"].shape[1]
    first = family.batch(stock, [conversation[:3]])
    # The seed of an image is its place in the row.
    seeds = [place for place, part in enumerate(conversation) if part == 0 and place > 2]
    second = dict(family.media(stock, [seeds]).inputs) if seeds else {}
    for name, value in whole.items():
        if value.shape == (1, total) and name != "attention_mask":
            second[name] = value[:, past:]
    second["attention_mask"] = whole["attention_mask"]
    positions = stack_call(stock, whole).get("position_ids")
    if positions is not None and "position_ids" in inspect.signature(stock.forward).parameters:
        second["position_ids"] = positions[..., past:]

    def promise(model):
        expected = logits_of(model, whole, use_cache=False)
        cache = DynamicCache(config=model.config.get_text_config())
        turns = [logits_of(model, turn, past_key_values=cache, use_cache=True) for turn in (first, second)]
        torch.testing.assert_close(torch.cat(turns, dim=1), expected, **TOLERANCE)

    check(promise, stock, inserted, deep_layer(family))


def test_embeddings(family, stock, inserted):
    """`inputs_embeds` that contain the features, with a mask of their positions, give the logits of ids."""
    inputs = family.batch(stock, only=0)
    ids = inputs["input_ids"]
    call = stack_call(stock, inputs)
    embeds = {"inputs_embeds": call.get("inputs_embeds"), "attention_mask": inputs["attention_mask"]}
    if call.get("position_ids") is not None:
        embeds["position_ids"] = call["position_ids"]

    def promise(model):
        expected = logits_of(model, inputs)
        multimodal = family.multimodal(ids)
        with insert_at(inserted, deep_layer(family), multimodal_mask=multimodal):
            torch.testing.assert_close(logits_of(model, embeds), expected, **TOLERANCE)

    check(promise, stock, inserted, deep_layer(family))


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

    check_with_and_without_insertion(promise)


def check_with_and_without_insertion(promise):
    """Check `promise(insert)` with an insert layer, and skip the test if it is broken without one too."""
    try:
        promise(True)
    except Exception:
        _skip_if_broken(promise, False)
        raise


def test_lora(family, stock):
    """A model that PEFT wraps before or after insertion, or that is merged, gives the same logits."""
    from peft import LoraConfig, get_peft_model

    inputs = family.batch(stock)
    layer = deep_layer(family)
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
        logits = logits_of(before, inputs)
        if insert:
            after = wrap(deep_insert(copy.deepcopy(stock), layer))
            assert torch.equal(logits_of(after, inputs), logits)
        merged = before.merge_and_unload()
        torch.testing.assert_close(logits_of(merged, inputs), logits, atol=1e-3, rtol=1e-3)
        if insert:
            assert insert_layer_of(merged) == layer
            with insert_at(merged, 0):
                assert not torch.allclose(logits_of(merged, inputs), logits, atol=1e-2)

    check_with_and_without_insertion(promise)


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
    """Half precision is about as near to the float32 reference as the reference in half precision is."""
    layer = deep_layer(family)
    exact = family.model(attention="eager")
    plain, model = copy.deepcopy(exact).to(dtype), deep_insert(copy.deepcopy(stock).to(dtype), layer)
    inputs = family.batch(stock, only=0)
    half = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    multimodal = family.multimodal(inputs["input_ids"])[0]
    with torch.no_grad():
        expected = reference_logits(exact, find_stack(exact).layers, inputs, layer, multimodal)
        try:
            half_logits = reference_logits(plain, find_stack(plain).layers, half, layer, multimodal).float()
        except RuntimeError as error:
            pytest.skip(f"the stock model fails as well: {str(error).strip().splitlines()[0][:160]}")
    logits = logits_of(model, half)[0].float()
    error, reference_error = (logits - expected).norm(), (half_logits - expected).norm()
    step = torch.finfo(dtype).eps * expected.norm()
    limit = 2 * reference_error + 4 * step
    assert error <= limit, f"the error is {error:.3g}, the reference's {reference_error:.3g}"


def test_without_a_cache(family, stock, inserted):
    inputs = family.batch(stock)
    with insert_at(inserted, depths_of(family, len(family.rows))):
        with_cache, without = (logits_of(inserted, inputs, use_cache=cached) for cached in (True, False))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(without[real], with_cache[real], **TOLERANCE)


def test_text_only(family, stock, inserted):
    """Without multimodal tokens, no row waits, and the logits are the stock model's."""
    inputs = family.batch(stock, [(5,), (3,)])
    try:
        expected = logits_of(stock, inputs)
    except Exception as error:
        pytest.skip(f"the stock model fails as well: {type(error).__name__}: {error}")
    real = inputs["attention_mask"].bool()
    with insert_at(inserted, deep_layer(family)):
        torch.testing.assert_close(logits_of(inserted, inputs)[real], expected[real], **TOLERANCE)


def test_two_threads(family, stock, inserted):
    inputs = family.batch(stock)
    layers = (1, family.deepest)
    expected, logits = [], [[], []]
    for layer in layers:
        with insert_at(inserted, layer):
            expected.append(logits_of(inserted, inputs))

    def work(place):
        with insert_at(inserted, layers[place]):
            for _ in range(2):
                logits[place].append(logits_of(inserted, inputs))

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, results in enumerate(logits):
        assert len(results) == 2
        # The address of memory can change a last bit, in the stock model too.
        for result in results:
            torch.testing.assert_close(result, expected[place], **TOLERANCE)
