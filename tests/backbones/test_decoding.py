"""Generation with a KV cache gives the tokens that recomputation gives, for every way to decode."""

from __future__ import annotations

import pytest
import torch
from batches import DEPTHS, ROWS
from transformers import DynamicCache
from zoo import FAMILIES, LAYERS, logits_of, skip_where_stock_differs

from deepinsert.backbones import deep_insert, insert_at, set_insert_layer

UNUSED_TOKEN = 0
"""An end token that the models never generate: up to 5.8, decoding with guesses needs an end token."""

STRATEGIES = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 8},
    "several": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layers", [3, DEPTHS], ids=["per batch", "per row"])
def test_cached_generation_equals_recomputation(family, stock, inserted, strategy, layers):
    # transformers repeats images one by one for beams, so a row of a beam batch may have only one image.
    rows = ROWS if strategy in ("greedy", "sampled") else [ROWS[0], ROWS[1], (2, 0, 5), ROWS[3]]
    inputs = family.batch(stock, rows, "left")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | STRATEGIES[strategy]
    if strategy != "sampled":
        skip_where_stock_differs(inserted, inputs, {"use_cache": False}, **options)
    tokens = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        with insert_at(inserted, layers), torch.no_grad():
            tokens.append(inserted.generate(**inputs, **options, use_cache=use_cache))
    assert tokens[0].shape[1] == inputs["input_ids"].shape[1] + 6
    assert torch.equal(tokens[0], tokens[1])


def test_prompt_lookup_decoding_equals_greedy(family, stock, inserted):
    inputs = family.batch(stock, [(3, 0, 4, 0, 9)], "left")
    set_insert_layer(inserted, 3)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": UNUSED_TOKEN}
    skip_where_stock_differs(inserted, inputs, {"prompt_lookup_num_tokens": 3}, **options)
    with torch.no_grad():
        greedy = inserted.generate(**inputs, **options)
        looked_up = inserted.generate(**inputs, **options, prompt_lookup_num_tokens=3)
    # Up to 5.12, the last guess may go one token beyond the limit.
    assert torch.equal(greedy, looked_up[:, : greedy.shape[1]])


def test_assisted_decoding_equals_greedy():
    """The assistant, the same model at another insert layer, is often wrong, so the cache is cropped."""
    family = FAMILIES["llava"]
    model, assistant = deep_insert(family.model(), 3), deep_insert(family.model(), 4)
    inputs = family.batch(model, [(3, 0, 4)], "left")
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": UNUSED_TOKEN}
    with torch.no_grad():
        greedy = model.generate(**inputs, **options)
        assisted = model.generate(**inputs, **options, assistant_model=assistant)
        with insert_at(model, 4):
            assert not torch.equal(model.generate(**inputs, **options), greedy)
    assert torch.equal(greedy, assisted)


def test_chunked_prefill_equals_one_prefill():
    """Some chunks are image tokens alone."""
    family = FAMILIES["llava"]
    model = deep_insert(family.model(), 3)
    inputs = family.batch(model, [(3, 0, 4)], "left")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        whole = model.generate(**inputs, **options)
        for size in (2, 5):
            skip_where_stock_differs(model, inputs, {"prefill_chunk_size": size}, **options)
            assert torch.equal(model.generate(**inputs, **options, prefill_chunk_size=size), whole)


def test_layers_below_hold_no_multimodal_key(family, stock, inserted):
    inputs = family.batch(stock, [(3, 0, 4)], "left")
    set_insert_layer(inserted, 3)
    with torch.no_grad():
        cache = inserted(**inputs, use_cache=True).past_key_values
    total = inputs["input_ids"].shape[1]
    assert [layer.keys.shape[2] for layer in cache.layers] == [7] * 3 + [total]
    assert [layer.get_seq_length() for layer in cache.layers] == [total] * LAYERS
    text = inserted.config.get_text_config()
    width = text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes == 2 * 4 * width * (3 * 7 + total)


@pytest.mark.parametrize("second", [(4,), (2, 0, 3)], ids=["text", "new image"])
def test_a_second_turn_on_a_kept_cache_equals_the_whole_conversation(family, stock, inserted, second):
    conversation = (3, 0, 4, *second)
    whole = family.batch(stock, [conversation])
    first_turn = family.batch(stock, [conversation[:3]])
    past = first_turn["input_ids"].shape[1]
    # The seed of an image is its place in the row.
    seeds = [[place for place, part in enumerate(conversation) if part == 0 and place > 2]]
    second_turn = family.media(stock, seeds).inputs if seeds[0] else {}
    second_turn |= {
        name: whole[name][:, past:] for name in ("input_ids", "mm_token_type_ids") if name in whole
    }
    second_turn["attention_mask"] = whole["attention_mask"]
    if family.name == "qwen2_5_vl":
        second_turn["position_ids"] = _rope_positions(inserted, whole)[..., past:]
    set_insert_layer(inserted, 3)
    expected = logits_of(inserted, whole)
    cache = DynamicCache(config=inserted.config.get_text_config())
    turns = [
        logits_of(inserted, turn, past_key_values=cache, use_cache=True) for turn in (first_turn, second_turn)
    ]
    torch.testing.assert_close(torch.cat(turns, dim=1), expected, atol=1e-5, rtol=1e-5)


def _rope_positions(model, inputs):
    """Return the 3-D rotary positions (3, B, S) that a Qwen-VL model gives its inputs."""
    options = {name: each for name, each in inputs.items() if name in ("mm_token_type_ids", "attention_mask")}
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], image_grid_thw=inputs["image_grid_thw"], **options
    )
    return positions


def test_generation_from_embeddings_equals_generation_from_ids():
    family = FAMILIES["llava"]
    model = deep_insert(family.model(), 3)
    inputs = family.batch(model, ROWS[:1], "left")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    features = torch.cat(model.model.get_image_features(inputs["pixel_values"]).pooler_output)
    multimodal = family.multimodal(inputs["input_ids"])
    embeds = embeds.masked_scatter(multimodal[..., None], features).detach()
    options = {"max_new_tokens": 5, "pad_token_id": 0, "num_beams": 2, "do_sample": False}
    with torch.no_grad():
        expected = model.generate(**inputs, **options)[:, -5:]
        with insert_at(model, 3, multimodal_mask=multimodal):
            tokens = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **options)
    assert torch.equal(tokens, expected)
