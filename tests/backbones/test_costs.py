"""Counted costs equal torch's own counter and real caches in every family, and the paper's figures."""

from __future__ import annotations

import pytest
import torch
import zoo
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from zoo.llava_like import square_images

from deepinsert.backbones import UnsupportedModelError
from deepinsert.backbones.costs.cost_model import CostModel, eq5_flops
from deepinsert.backbones.costs.encoder_costs import flop_counter
from deepinsert.backbones.mechanism.insertion import deep_insert


def _mixtral():
    """Return a small LLaVA whose decoder has experts with stacked matrices."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config={"model_type": "mixtral", **zoo.TEXT, **experts},
            vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **zoo.VISION},
            image_token_id=zoo.PLACEHOLDER,
            image_seq_length=4,
        )
    )


ALL = zoo.FAMILIES | {"llava-mixtral": zoo.Family("llava-mixtral", _mixtral, square_images)}
COUNTED = (
    *("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen2_audio", "internvl"),
    *("idefics3", "smolvlm", "mistral3", "gemma3", "paligemma", "aria", "blip-2", "llava-mixtral"),
)
ROW = (0, 7)
"""The parts of a row: 0 is an image, another number so many words."""


@pytest.fixture(scope="module", params=COUNTED)
def family(request):
    return ALL[request.param]


@pytest.fixture(scope="module")
def model(family):
    # The counter fails on trainable weights that are inputs to a module, such as BLIP-2's queries.
    return deep_insert(family.model().requires_grad_(False), 0)


@pytest.fixture(scope="module")
def costs(model):
    return CostModel.from_model(model)


@pytest.fixture(scope="module")
def llava():
    return CostModel.from_model(ALL["llava"].model())


def prompt(family, model, row=ROW):
    """Return a row as the model takes it, and its numbers of text and multimodal tokens."""
    inputs = family.batch(model, rows=[row])
    multimodal = int(family.multimodal(inputs["input_ids"]).sum())
    return inputs, inputs["input_ids"].shape[1] - multimodal, multimodal


def count_flops(model, inputs, insert_layer=0, **options) -> int:
    deep_insert(model, insert_layer)
    with torch.no_grad(), flop_counter() as counter:
        model(**inputs, **options)
    deep_insert(model, 0)
    return counter.get_total_flops()


def generate(model, inputs, insert_layer, tokens):
    """Return the cache after generating `tokens` tokens, of which it does not hold the last."""
    deep_insert(model, insert_layer)
    try:
        with torch.no_grad():
            options = {"max_new_tokens": tokens, "do_sample": False, "return_dict_in_generate": True}
            return model.generate(**inputs, **options).past_key_values
    finally:
        deep_insert(model, 0)


def test_eq5_gives_the_ratios_of_the_paper():
    def flops(insert_layer):
        return eq5_flops(32, 4096, 11008, 64, 576, insert_layer)

    ratios = [flops(layer) / flops(0) for layer in (4, 8, 12)]
    assert ratios == pytest.approx([0.887, 0.774, 0.661], abs=5e-4)


def test_prefill_agrees_with_the_counter_at_every_insert_layer(family, model, costs):
    inputs, text, multimodal = prompt(family, model)
    for layer in range(costs.num_layers + 1):
        expected = count_flops(model, inputs, layer, use_cache=False)
        assert costs.prefill_flops(text, multimodal, layer) == pytest.approx(expected, rel=0.01)
    expected = count_flops(model, inputs, use_cache=False, logits_to_keep=1)
    assert costs.prefill_flops(text, multimodal, 0, logits_to_keep=1) == pytest.approx(expected, rel=0.01)


def test_several_images_are_counted(family, model, costs):
    inputs, text, multimodal = prompt(family, model, (0, 3, 0, 4))
    for layer in (0, 2):
        expected = count_flops(model, inputs, layer, use_cache=False)
        assert costs.prefill_flops(text, multimodal, layer, images=2) == pytest.approx(expected, rel=0.01)


def test_a_measured_encoder_agrees_with_the_counted_one(family, model, costs):
    inputs, _, multimodal = prompt(family, model)
    measured = CostModel.from_model(model, inputs).encoder
    assert (costs.encoder.origin, measured.origin) == ("counted", "measured")
    assert costs.encoder.flops(multimodal, 1) == pytest.approx(measured.flops(multimodal, 1), rel=0.01)


def test_an_encoder_of_unknown_kind_is_marked_as_estimated():
    assert CostModel.from_model(zoo.FAMILIES["idefics2"].model()).encoder.origin == "estimated"


@pytest.mark.parametrize("insert_layer", [0, 2, zoo.LAYERS])
def test_decoding_agrees_with_the_counter(family, model, costs, insert_layer):
    inputs, text, multimodal = prompt(family, model)
    totals = []
    for tokens in (1, 2):
        with flop_counter() as counter:
            generate(model, inputs, insert_layer, tokens)
        totals.append(counter.get_total_flops())
    cost = costs.decode_cost(text, multimodal, insert_layer)
    assert cost.flops == pytest.approx(totals[1] - totals[0], rel=0.01)


@pytest.mark.parametrize("insert_layer", [0, 2, zoo.LAYERS])
def test_cache_bytes_are_those_of_the_cache(family, model, costs, insert_layer):
    inputs, text, multimodal = prompt(family, model)
    for tokens in (1, 5):
        cache = generate(model, inputs, insert_layer, tokens)
        cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert costs.kv_cache_bytes(text + tokens - 1, multimodal, insert_layer) == cache_bytes


def test_a_configuration_gives_the_costs_of_its_model(family, model, costs):
    assert CostModel.from_config(model.config, torch.float32) == costs
    weights = {id(weight): weight.nbytes for weight in model.parameters()}
    assert costs.weight_bytes == sum(weights.values())


def test_a_configuration_without_images_or_sounds_is_refused():
    with pytest.raises(UnsupportedModelError, match="'llama' is no multimodal language model"):
        CostModel.from_config(LlamaConfig())


def test_sliding_layers_cache_less_than_their_window():
    costs = CostModel.from_model(ALL["gemma3"].model())
    windows = [limit for limit in costs.cache_limits if limit is not None]
    assert windows and None in costs.cache_limits
    assert costs.kv_cache_bytes(1000, 1000, 0) - costs.kv_cache_bytes(1000, 0, 0) == (
        4 * 1000 * costs.key_value_widths[0] * costs.cache_limits.count(None)
    )


def test_cache_bytes_follow_the_formula_and_the_precision():
    costs = CostModel.from_model(ALL["llava"].model().to(torch.bfloat16))
    assert costs.kv_cache_bytes(20, 16, 3) == 2 * 2 * 8 * 2 * (3 * 20 + 1 * 36)


def test_a_batch_costs_the_sum_of_its_rows(llava):
    rows = [(20, 16, 0), (5, 0, 2), (9, 32, 4)]
    text, multimodal, layers = zip(*rows, strict=True)
    for cost_of in (llava.decoder_flops, llava.prefill_flops, llava.kv_cache_bytes):
        assert cost_of(text, multimodal, layers) == sum(cost_of(*row) for row in rows)
        assert cost_of(20, 16, [0, 2, 2]) == cost_of(20, 16, 0) + 2 * cost_of(20, 16, 2)
    stock = sum(llava.prefill_flops(20, 16, 0) for _ in range(3))
    assert llava.flops_ratio(20, 16, [0, 2, 2]) == llava.prefill_flops(20, 16, [0, 2, 2]) / stock


def test_decoding_reads_weights_once_for_the_batch_and_every_cache(llava):
    one, three = llava.decode_cost(20, 16, 2), llava.decode_cost(20, 16, [2, 0, 4])
    assert three.weight_bytes == one.weight_bytes
    assert three.kv_cache_bytes == sum(llava.kv_cache_bytes(20, 16, layer) for layer in (2, 0, 4))
    assert three.flops == sum(llava.decode_cost(20, 16, layer).flops for layer in (2, 0, 4))
    # Four layers (q, o: 32 x 32; k, v: 32 x 16; three of the MLP: 32 x 48; two norms) and the head.
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    assert one.weight_bytes == 4 * (4 * layer + 32 * 64)


def test_a_mixture_reads_the_experts_that_its_rows_visit():
    traffic = CostModel.from_model(ALL["llava-mixtral"].model()).traffic[0]
    assert (traffic.experts, traffic.experts_per_row, traffic.expert_bytes) == (4, 2, 4 * 4 * 3 * 32 * 48)
    assert traffic.weights_read(1) == traffic.weight_bytes + traffic.expert_bytes / 2
    assert traffic.weights_read(2) == traffic.weight_bytes + traffic.expert_bytes * 3 / 4
    assert traffic.weights_read(1000) == pytest.approx(traffic.weight_bytes + traffic.expert_bytes)


def test_the_whole_model_saves_a_smaller_share_than_its_decoder(llava):
    ratios = [llava.flops_ratio(64, 576, layer) for layer in range(llava.num_layers + 1)]
    assert ratios[0] == 1
    assert ratios == sorted(ratios, reverse=True)
    decoder = llava.decoder_flops(64, 576, 2) / llava.decoder_flops(64, 576, 0)
    assert decoder < ratios[2]
    # Without multimodal tokens there is nothing to skip and no encoder to run.
    assert llava.flops_ratio(64, 0, 3) == 1
    assert llava.prefill_flops(64, 0, 0) == llava.decoder_flops(64, 0, 0) + 64 * llava.head


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 10, 5), "insert_layer 5: give a layer from 0 to 4"),
        ((10, 10, [0, -1]), "insert_layer -1: give a layer from 0 to 4"),
        ((0, 0, 0), "are no prompt"),
        (([1, 2], 3, [0, 1, 2]), "one number for all rows, or one per row"),
    ],
)
def test_impossible_prompts_are_refused(llava, arguments, message):
    with pytest.raises(ValueError, match=message):
        llava.prefill_flops(*arguments)
