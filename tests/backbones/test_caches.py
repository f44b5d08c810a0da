"""Tokens that skip layers give the same results with every kind of KV cache as without a cache."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch
from batches import DEPTHS, LONGER_ROWS
from reference import waiting_below
from torch import nn
from transformers import DynamicCache, LlavaConfig, LlavaForConditionalGeneration, QuantizedCache, StaticCache
from zoo import FAMILIES, PLACEHOLDER, TEXT, VISION, Family, logits_of, skip_here, skip_where_stock_differs
from zoo.llava_like import square_images

from deepinsert import UnsupportedCacheError
from deepinsert.backbones import UnsupportedModelError, deep_insert, insert_at
from deepinsert.backbones.compat.transformers import QUANTISED, STATIC_COUNTS
from deepinsert.backbones.mechanism.cache import LayerKeys, stored_keys
from deepinsert.backbones.mechanism.calls import ATTRIBUTE

WINDOW = 6
OPTIONS = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": 0}
"""No model generates the end token 0; up to 5.8, decoding with guesses needs an end token."""


def _sliding():
    """Return a small LLaVA in which every other layer has a window shorter than the prompt."""
    kinds = ["sliding_attention", "full_attention"] * 2
    text = {**TEXT, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": kinds}
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config={"model_type": "qwen2", **text},
            vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
            image_token_id=PLACEHOLDER,
        )
    )


SLIDING = Family("llava-sliding", _sliding, square_images)


@pytest.fixture(scope="module", params=["full", "sliding"])
def family(request):
    return {"full": FAMILIES["llava"], "sliding": SLIDING}[request.param]


@pytest.fixture(scope="module")
def model(family):
    return deep_insert(family.model(), 0)


@pytest.fixture(autouse=True)
def skip_static_caches_that_cannot_skip_tokens(request):
    if "static" in request.node.name and not STATIC_COUNTS and "refused" not in request.node.name:
        skip_here("static caches cannot skip tokens, as to 5.3")


def generate(model, inputs, layers, **options):
    with insert_at(model, layers), torch.no_grad():
        return model.generate(**inputs, **(OPTIONS | options))


@pytest.mark.parametrize("layers", [3, DEPTHS], ids=["one layer", "layer per row"])
@pytest.mark.parametrize("beams", [1, 3])
def test_sliding_windows(layers, beams):
    """The window is measured in positions of the full sequence, skipped ones included."""
    model = deep_insert(SLIDING.model(), 0)
    rows = [LONGER_ROWS[0], LONGER_ROWS[1], (2, 0, 9), LONGER_ROWS[3]]
    inputs = SLIDING.batch(model, rows)
    cached = generate(model, inputs, layers, num_beams=beams)
    assert torch.equal(cached, generate(model, inputs, layers, num_beams=beams, use_cache=False))


def test_a_sliding_layer_keeps_no_more_than_its_window():
    model = deep_insert(SLIDING.model(), 3)
    inputs = SLIDING.batch(model, [(3, 0, 9)])
    cache = DynamicCache(config=model.config.get_text_config())
    logits_of(model, inputs, past_key_values=cache, use_cache=True)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [WINDOW - 1, 12, WINDOW - 1, 16]
    assert [layer.get_seq_length() for layer in cache.layers] == [16] * 4


@pytest.mark.parametrize("layers", [2, 4, DEPTHS], ids=["middle", "never", "layer per row"])
def test_static_cache(family, model, layers):
    inputs = family.batch(model, LONGER_ROWS)
    expected = generate(model, inputs, layers)
    assert torch.equal(generate(model, inputs, layers, cache_implementation="static"), expected)


def test_static_cache_used_again(family, model):
    """One cache serves three prompts; the second has no image and insert layer 0."""
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=40)
    for rows, layer in (([(3, 0, 4)], 3), ([(7,)], 0), ([(2, 0, 6)], 2)):
        inputs = family.batch(model, rows)
        expected = generate(model, inputs, layer)
        cache.reset()
        assert torch.equal(generate(model, inputs, layer, past_key_values=cache), expected)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_second_turn(family, model, kind):
    """More words are added on a kept cache, after the window was full."""
    whole = family.batch(model, [(3, 0, 4, 7)])
    past = family.batch(model, [(3, 0, 4)])["input_ids"].shape[1]
    config = model.config.get_text_config()
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=32)
    first = {name: value[:, :past] if value.ndim == 2 else value for name, value in whole.items()}
    with insert_at(model, 3):
        expected = logits_of(model, whole)
        logits = [logits_of(model, first, past_key_values=cache, use_cache=True)]
        for piece in (slice(past, past + 5), slice(past + 5, past + 6), slice(past + 6, None)):
            mask = whole["attention_mask"][:, : piece.stop]
            turn = {"input_ids": whole["input_ids"][:, piece], "attention_mask": mask}
            logits.append(logits_of(model, turn, past_key_values=cache, use_cache=True))
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_second_image_in_a_later_turn(family, model, kind):
    whole = family.batch(model, [(3, 0, 4, 0, 3)])
    past = family.batch(model, [(3, 0, 4)])["input_ids"].shape[1]
    config = model.config.get_text_config()
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=32)
    turns = []
    for place, image in ((slice(0, past), slice(0, 1)), (slice(past, None), slice(1, 2))):
        ids, mask = whole["input_ids"][:, place], whole["attention_mask"][:, : place.stop]
        turns.append({"input_ids": ids, "attention_mask": mask, "pixel_values": whole["pixel_values"][image]})
    with insert_at(model, 2):
        expected = logits_of(model, whole)
        logits = [logits_of(model, turn, past_key_values=cache, use_cache=True) for turn in turns]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_a_quantised_cache_holds_the_same_rows():
    """Four-bit keys are not exact, but the lengths show that each layer holds its own rows."""
    pytest.importorskip("optimum.quanto")
    model = deep_insert(FAMILIES["llava"].model(), 3)
    inputs = FAMILIES["llava"].batch(model, LONGER_ROWS)
    cache = QuantizedCache("quanto", model.config.get_text_config(), nbits=4, q_group_size=8)
    tokens = generate(model, inputs, 3, past_key_values=cache)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 9
    assert [layer.get_seq_length() for layer in cache.layers] == [tokens.shape[1] - 1] * 4
    words = inputs["attention_mask"].bool() & (inputs["input_ids"] != PLACEHOLDER)
    text = int(words.sum(dim=1).max())
    assert [stored_keys(layer) for layer in cache.layers] == [text + 8] * 3 + [tokens.shape[1] - 1]


@pytest.mark.parametrize("layers", [3, DEPTHS], ids=["one layer", "layer per row"])
def test_an_eight_bit_cache(layers):
    """A short layer with 8-bit keys gives logits that are as exact as 8 bits allow."""
    if len(QUANTISED) < 3:
        skip_here("there is no cache of 8 bits, as since 5.21")
    model = deep_insert(FAMILIES["llava"].model(), 0)
    inputs = FAMILIES["llava"].batch(model, LONGER_ROWS)
    config = model.config.get_text_config()
    step_logits = []
    for cache in (DynamicCache(config=config), QuantizedCache("fp8", config)):
        prompt = {name: value[:, :-2] if value.ndim == 2 else value for name, value in inputs.items()}
        with insert_at(model, layers):
            logits_of(model, prompt, past_key_values=cache, use_cache=True)
            step = {"input_ids": inputs["input_ids"][:, -2:], "attention_mask": inputs["attention_mask"]}
            step_logits.append(logits_of(model, step, past_key_values=cache, use_cache=True))
        assert {layer.get_seq_length() for layer in cache.layers} == {inputs["input_ids"].shape[1]}
    exact, eight_bit = step_logits
    if not eight_bit.isfinite().all():
        pytest.skip(f"torch {torch.__version__} makes no finite numbers of 8 bits, in the stock model either")
    assert (exact - eight_bit).abs().max() < 0.1 * exact.abs().max()


def test_a_copied_cache_continues_independently(family, model):
    inputs = family.batch(model, LONGER_ROWS)
    step = {"input_ids": torch.full((4, 1), 30)}
    longer = torch.cat([inputs["attention_mask"], torch.ones(4, 1, dtype=torch.long)], dim=1)
    with insert_at(model, 3):
        cache = DynamicCache(config=model.config.get_text_config())
        logits_of(model, inputs, past_key_values=cache, use_cache=True)
        duplicate = copy.deepcopy(cache)
        step |= {"attention_mask": longer}
        logits = logits_of(model, step, past_key_values=cache, use_cache=True)
        from_duplicate = logits_of(model, step, past_key_values=duplicate, use_cache=True)
    assert torch.equal(logits, from_duplicate)


def test_decoding_with_assistance(family, model):
    """Prompt lookup crops the cache after a wrong guess."""
    inputs = family.batch(model, [(3, 0, 4, 0, 9)])
    options = OPTIONS | {"max_new_tokens": 14}
    skip_where_stock_differs(model, inputs, {"prompt_lookup_num_tokens": 3}, **options)
    expected = generate(model, inputs, 3, max_new_tokens=14)
    tokens = generate(model, inputs, 3, max_new_tokens=14, prompt_lookup_num_tokens=3)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(("first", "then"), [(3, 1), (4, 2), (3, 0), (1, 3)])
def test_a_later_turn_at_another_layer(family, model, kind, first, then):
    """The first turn stays as it was; the second image is inserted at the second turn's layer."""
    whole = family.batch(model, [(3, 0, 4), (9,)])
    past = family.batch(model, [(3, 0, 4)])["input_ids"].shape[1]
    config = model.config.get_text_config()
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=32)
    ids = torch.cat([whole["input_ids"][:1, :past], torch.tensor([[PLACEHOLDER] * 4 + [30, 31]])], dim=1)
    mask = torch.ones_like(ids)
    image = family.media(model, [[7]]).inputs["pixel_values"]
    for layer, place, pixels in (
        (first, slice(0, past), whole["pixel_values"]),
        (then, slice(past, None), image),
    ):
        turn = {"input_ids": ids[:, place], "attention_mask": mask[:, : place.stop], "pixel_values": pixels}
        with insert_at(model, layer):
            logits = logits_of(model, turn, past_key_values=cache, use_cache=True)
    plain = family.model(attention="eager")
    depths = torch.where(ids[0] == PLACEHOLDER, then, 0)
    depths[:past] = torch.where(ids[0, :past] == PLACEHOLDER, first, 0)
    layers = plain.get_decoder().layers
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(waiting_below(nn.ModuleList([layer]), 1, depths > index))
        inputs = {"input_ids": ids, "attention_mask": mask}
        pixels = torch.cat([whole["pixel_values"], image])
        expected = logits_of(plain, inputs, pixel_values=pixels, use_cache=False)
    torch.testing.assert_close(logits, expected[:, past:], atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(STATIC_COUNTS, reason="this version's static caches can skip tokens")
def test_a_static_cache_is_refused_where_it_counts_keys(family):
    model = deep_insert(family.model(), 0)  # after the error, the model keeps the cache
    inputs = family.batch(model, LONGER_ROWS)
    with pytest.raises(UnsupportedCacheError, match=r"transformers 5\.4 on, and this is 5\."):
        generate(model, inputs, 3, cache_implementation="static")


def test_a_mask_as_long_as_a_static_cache():
    """The mask may be 0 at positions that no token has yet."""
    family = FAMILIES["llava"]
    model = deep_insert(family.model(), 3)
    inputs = family.batch(model, LONGER_ROWS)
    expected = logits_of(model, inputs)
    batch, length = inputs["input_ids"].shape
    mask = torch.cat([inputs["attention_mask"], torch.zeros(batch, 40 - length, dtype=torch.long)], dim=1)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=40)
    logits = logits_of(model, inputs | {"attention_mask": mask}, past_key_values=cache, use_cache=True)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=1e-5)


def test_flash_attention_is_refused_where_it_counts_a_window_in_rows():
    """In a short layer the window would reach farther than in the stock model; no kernel is called."""
    model = deep_insert(SLIDING.model(), 3)
    inputs = SLIDING.batch(model, [(3, 0, 4)])
    stack = model.get_decoder()
    stack.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match=r"flash_attention_2.*set_attn_implementation"):
        logits_of(model, inputs)
    limits = getattr(stack, ATTRIBUTE).limits
    limits.check_window(0, LayerKeys(None, 0, WINDOW), "flash")
    limits.check_window(1, LayerKeys(None, 1, WINDOW + 1), "flash")
    with pytest.raises(UnsupportedModelError, match=f"window of {WINDOW} positions of layer 2"):
        limits.check_window(2, LayerKeys(None, 2, WINDOW + 1), "flash")
    model.set_attn_implementation("sdpa")
    assert logits_of(model, inputs).isfinite().all()


def test_an_offloaded_cache_is_not_refused():
    """Stock offloading needs CUDA streams, so only our own checks run here."""
    model = deep_insert(FAMILIES["llava"].model(), 3)
    try:
        cache = DynamicCache(config=model.config.get_text_config(), offloading=True)
    except RuntimeError as error:
        pytest.skip(f"torch is built for CUDA and finds no driver for it: {error}"[:120])
    for index in range(4):
        LayerKeys(cache, index, 5).check_can_skip()


def test_a_cache_cropped_to_the_end_of_an_image():
    family = FAMILIES["llava"]
    model = deep_insert(family.model(), 3)
    inputs = family.batch(model, [(0, 6)])
    expected = logits_of(model, inputs)
    cache = DynamicCache(config=model.config.get_text_config())
    logits_of(model, inputs, past_key_values=cache, use_cache=True)
    cache.crop(-6)
    again = {"input_ids": inputs["input_ids"][:, -6:], "attention_mask": inputs["attention_mask"]}
    logits = logits_of(model, again, past_key_values=cache, use_cache=True)
    torch.testing.assert_close(logits, expected[:, -6:], atol=1e-5, rtol=1e-5)
