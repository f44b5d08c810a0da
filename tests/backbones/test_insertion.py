"""The promises of the variable-depth forward, one test each, over the model families."""

from __future__ import annotations

import copy
import threading
from importlib.util import find_spec

import pytest
import torch
from reference import reference_logits
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from zoo import FAMILIES, LAYERS, forget_the_last_batch, logits_of, skip_here, skip_where_stock_differs

from deepinsert.backbones import deep_insert, insert_at, insert_layer_of, remove_deep_insert, set_insert_layer

ROWS = [(3, 0, 4), (5,), (2, 0, 3, 0, 2), (0, 6)]
"""A batch with one, no and two images; one of them first of all."""
DEPTHS = [2, 4, 1, 3]


def reference_of(plain, inputs, family, layer):
    """The reference's logits of one row by itself; `plain` is a stock model with eager attention."""
    multimodal = family.multimodal(inputs["input_ids"])[0]
    return reference_logits(plain, plain.get_decoder().layers, inputs, layer, multimodal)


def real_logits(model, inputs, row):
    return logits_of(model, inputs)[row][inputs["attention_mask"][row].bool()]


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
    changed = 0.0
    for layer in range(LAYERS + 1):
        with insert_at(inserted, layer):
            got = logits_of(inserted, inputs)
        for row in range(len(ROWS)):
            real = inputs["attention_mask"][row].bool()
            with torch.no_grad():
                expected = reference_of(eager_stock, family.batch(stock, ROWS, only=row), family, layer)
            torch.testing.assert_close(got[row][real], expected, atol=1e-5, rtol=1e-5)
        changed = max(changed, float((got - logits_of(stock, inputs)).abs().max()))
    inserted.set_attn_implementation("sdpa")
    assert changed > 0.1, "inserting later must change the logits, or this test shows nothing"


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
        got = logits_of(inserted, inputs)
    for row in range(2):
        with torch.no_grad():
            expected = reference_of(eager_stock, family.batch(stock, images, only=row), family, 3)
        real = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(got[row][real], expected, atol=1e-5, rtol=1e-5)


NEVER = 0
"""An end token that the models never give: to 5.8, guessing ahead needs one."""

STRATEGIES = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 8},
    "several": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layers", [3, DEPTHS], ids=["per batch", "per row"])
def test_cached_generation_equals_recomputation(family, stock, inserted, strategy, layers):
    # transformers repeats images for beams one by one, so a row of a beam batch may have one image only.
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
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": NEVER}
    skip_where_stock_differs(inserted, inputs, {"prompt_lookup_num_tokens": 3}, **options)
    with torch.no_grad():
        greedy = inserted.generate(**inputs, **options)
        looked_up = inserted.generate(**inputs, **options, prompt_lookup_num_tokens=3)
    # To 5.12, the last guess may go one token beyond the limit.
    assert torch.equal(greedy, looked_up[:, : greedy.shape[1]])


def test_assisted_decoding_equals_greedy():
    """The assistant is the same model at another insert layer, often wrong: the cache is cropped."""
    family = FAMILIES["llava"]
    model, assistant = deep_insert(family.model(), 3), deep_insert(family.model(), 4)
    inputs = family.batch(model, [(3, 0, 4)], "left")
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": NEVER}
    with torch.no_grad():
        greedy = model.generate(**inputs, **options)
        assisted = model.generate(**inputs, **options, assistant_model=assistant)
        with insert_at(model, 4):
            assert not torch.equal(model.generate(**inputs, **options), greedy)
    assert torch.equal(greedy, assisted)


def test_bf16_is_as_near_to_float32_as_the_reference_in_bf16():
    family = FAMILIES["llava"]
    exact = family.model(attention="eager")
    half, model = copy.deepcopy(exact).bfloat16(), deep_insert(family.model().bfloat16(), 3)
    inputs = family.batch(exact, [(3, 0, 4)])
    less = inputs | {"pixel_values": inputs["pixel_values"].bfloat16()}
    with torch.no_grad():
        expected = reference_of(exact, inputs, family, 3)
        near = reference_of(half, less, family, 3)
    got = logits_of(model, less)[0]
    assert got.dtype == torch.bfloat16
    step = torch.finfo(torch.bfloat16).eps * expected.norm()
    assert (got - expected).norm() <= 2 * (near - expected).norm() + step


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
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 2 * 4 * width * (3 * 7 + total)


def test_positions_are_those_of_the_full_sequence(family, stock, inserted):
    inputs = family.batch(stock, [(3, 0, 4)], "left")
    seen = {}
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
        seen[model] = tables
        for hook in hooks:
            hook.remove()
    text = ~family.multimodal(inputs["input_ids"])[0]
    full = seen[stock][0]
    assert all(torch.equal(table, full[..., text, :]) for table in seen[inserted][:2])
    assert all(torch.equal(table, full) for table in seen[inserted][2:])


@pytest.mark.parametrize("second", [(4,), (2, 0, 3)], ids=["text", "new image"])
def test_a_second_turn_on_a_kept_cache_equals_the_whole_conversation(family, stock, inserted, second):
    conversation = (3, 0, 4, *second)
    whole = family.batch(stock, [conversation])
    first = family.batch(stock, [conversation[:3]])
    said = first["input_ids"].shape[1]
    # Images are seeded by their place in the row.
    images = [[place for place, part in enumerate(conversation) if part == 0 and place > 2]]
    then = family.media(stock, images).inputs if images[0] else {}
    then |= {name: whole[name][:, said:] for name in ("input_ids", "mm_token_type_ids") if name in whole}
    then["attention_mask"] = whole["attention_mask"]
    if family.name == "qwen2_5_vl":
        then["position_ids"] = _rope_positions(inserted, whole)[..., said:]
    set_insert_layer(inserted, 3)
    expected = logits_of(inserted, whole)
    cache = DynamicCache(config=inserted.config.get_text_config())
    turns = [logits_of(inserted, turn, past_key_values=cache, use_cache=True) for turn in (first, then)]
    torch.testing.assert_close(torch.cat(turns, dim=1), expected, atol=1e-5, rtol=1e-5)


def _rope_positions(model, whole):
    told = {name: each for name, each in whole.items() if name in ("mm_token_type_ids", "attention_mask")}
    positions, _ = model.model.get_rope_index(
        whole["input_ids"], image_grid_thw=whole["image_grid_thw"], **told
    )
    return positions


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
        own = reference_of(plain, family.batch(stock, ROWS[:3], only=row), family, 3)
        torch.nn.functional.cross_entropy(own[:-1], target).backward()
    compared = 0
    for (name, mine), theirs in zip(inserted.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, atol=2e-5, rtol=1e-3, msg=name)
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


def test_removing_gives_the_stock_model_back(family, stock):
    model = deep_insert(copy.deepcopy(stock), 3)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert type(model) is type(stock)
    remove_deep_insert(model)
    inputs = family.batch(stock, ROWS, "left")
    assert torch.equal(logits_of(model, inputs), logits_of(stock, inputs))
    for mine, theirs in zip(model.modules(), stock.modules(), strict=True):
        assert type(mine) is type(theirs)
        assert vars(mine).keys() == vars(theirs).keys()
        assert len(mine._forward_hooks) == len(theirs._forward_hooks)
        assert len(mine._forward_pre_hooks) == len(theirs._forward_pre_hooks)
    assert not hasattr(model.config, "deepinsert")
    with pytest.raises(ValueError, match="call deep_insert"):
        insert_layer_of(model)


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
        # Not bit for bit: where PEFT has wrapped them, stock models round otherwise on some processors too.
        got, expected = logits_of(model, inputs), logits_of(plain, inputs)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_hidden_states_have_full_length(family, stock, inserted):
    inputs = family.batch(stock, ROWS, "right")
    with insert_at(inserted, 3), torch.no_grad():
        states = inserted(**inputs, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(*inputs["input_ids"].shape, 32)] * (LAYERS + 1)
    for row, ids in enumerate(inputs["input_ids"]):
        multimodal = family.multimodal(ids)
        # Until it is inserted, a multimodal row is what it was when it entered layer 0.
        assert torch.equal(states[3][row, multimodal], states[0][row, multimodal])
        text = ~multimodal & inputs["attention_mask"][row].bool()
        assert not torch.allclose(states[3][row, text], states[0][row, text])


@pytest.mark.parametrize("name", ["token_type_ids", "mm_token_type_ids"])
def test_what_a_tokenizer_adds_is_not_in_the_way(family, stock, inserted, name):
    inputs = family.batch(stock, ROWS, "left")
    with insert_at(inserted, 3):
        expected = logits_of(inserted, inputs)
        got = logits_of(inserted, {name: torch.zeros_like(inputs["input_ids"]), **inputs})
    assert torch.equal(got, expected)


def test_a_copy_and_its_original_do_not_share_a_layer(family, stock):
    one = deep_insert(copy.deepcopy(stock), 2)
    two = copy.deepcopy(one)
    set_insert_layer(two, 4)
    inputs = family.batch(stock, ROWS, "left")
    with insert_at(one, 4):
        at_four = logits_of(one, inputs)
    assert insert_layer_of(one) == 2
    assert torch.equal(logits_of(two, inputs), at_four)
    del one
    assert torch.equal(logits_of(two, inputs), at_four)


def test_threads_have_their_own_layers(family, stock, inserted):
    if find_spec("transformers.utils.output_capturing") is None:
        skip_here("the stock model hands threads each other's outputs, as to 5.1")
    inputs = family.batch(stock, ROWS, "left")
    expected = []
    for layer in range(4):
        with insert_at(inserted, layer):
            expected.append(logits_of(inserted, inputs))
    got = [[] for _ in expected]

    def work(layer):
        with insert_at(inserted, layer):
            for _ in range(5):
                got[layer].append(logits_of(inserted, inputs))

    threads = [threading.Thread(target=work, args=(layer,)) for layer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for layer, results in enumerate(got):
        assert len(results) == 5 and all(torch.equal(result, expected[layer]) for result in results)


def test_embeddings_instead_of_ids_with_a_mask():
    family = FAMILIES["llava"]
    model = deep_insert(family.model(), 3)
    inputs = family.batch(model, ROWS[:1], "left")
    expected = logits_of(model, inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    features = torch.cat(model.model.get_image_features(inputs["pixel_values"]).pooler_output)
    multimodal = family.multimodal(inputs["input_ids"])
    embeds = embeds.masked_scatter(multimodal[..., None], features).detach()
    with insert_at(model, 3, multimodal_mask=multimodal):
        got = logits_of(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    mask = inputs["attention_mask"]
    with pytest.raises(ValueError, match="multimodal_mask"):
        model(inputs_embeds=embeds.clone(), attention_mask=mask)
    with (
        pytest.raises(ValueError, match="one value per position"),
        insert_at(model, 3, multimodal_mask=multimodal[:, 1:]),
    ):
        model(inputs_embeds=embeds, attention_mask=mask)
    # The failure leaves nothing behind.
    assert torch.equal(logits_of(model, inputs), expected)


def test_a_packed_batch_with_its_own_mask_and_positions():
    """Two questions on one image in one row: a 4-D mask, and positions that restart."""
    family = FAMILIES["llava"]
    model = deep_insert(family.model(), 3)
    one = family.batch(model, [(2, 0, 4)], "left")
    ids = one["input_ids"][0]
    prefix, question = ids[:6], ids[6:]
    other = (question + 1).clamp(max=59)
    packed = torch.cat([prefix, question, other])[None]
    positions = torch.cat([torch.arange(10), torch.arange(6, 10)])[None]
    allowed = torch.ones(14, 14, dtype=torch.bool).tril()
    allowed[10:, 6:10] = False
    got = logits_of(
        model,
        {
            "input_ids": packed,
            "pixel_values": one["pixel_values"],
            "attention_mask": allowed[None, None],
            "position_ids": positions,
        },
    )[0]
    for words, place in ((question, slice(6, 10)), (other, slice(10, 14))):
        single = {
            "input_ids": torch.cat([prefix, words])[None],
            "attention_mask": torch.ones(1, 10, dtype=torch.long),
            "pixel_values": one["pixel_values"],
        }
        torch.testing.assert_close(got[place], logits_of(model, single)[0, 6:], atol=1e-5, rtol=1e-5)


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
            got = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **options)
    assert torch.equal(got, expected)


def test_a_batch_without_images_is_the_stock_models(family, stock, inserted):
    inputs = family.batch(stock, [(5,), (5,)])
    set_insert_layer(inserted, 3)
    forget_the_last_batch(inserted)
    with torch.no_grad():
        output = inserted(**inputs, use_cache=True)
    assert torch.equal(output.logits, logits_of(stock, inputs))
    assert {type(layer) for layer in output.past_key_values.layers} == {DynamicLayer}


def test_embeddings_of_another_prompt_say_nothing():
    """Two prompts of one length are embedded before the first is given to the model."""
    family = FAMILIES["llava"]
    model = deep_insert(family.model(), 3)
    with torch.no_grad():
        one, two = (
            model.get_input_embeddings()(family.batch(model, rows)["input_ids"]).clone()
            for rows in ([(3, 0, 4)], [(0, 7)])
        )
        assert one.shape == two.shape
        with pytest.raises(ValueError, match="multimodal_mask"):
            model(inputs_embeds=one)


def test_what_older_loops_pass_is_not_in_the_way():
    family = FAMILIES["llava"]
    model = deep_insert(family.model(), 3)
    inputs = family.batch(model, ROWS, "left")
    place = torch.arange(inputs["input_ids"].shape[1])
    assert torch.equal(logits_of(model, inputs, cache_position=place), logits_of(model, inputs))
