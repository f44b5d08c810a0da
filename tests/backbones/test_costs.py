"""Counted costs against torch's own counter over the stock model, and against the paper's figures."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from backbones.costs import CostModel, eq5_flops
from backbones.encoder_costs import flop_counter
from backbones.families import placeholder_token_ids
from backbones.insertion import deep_insert

IMAGE, TEXT = 90, 20
SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "vocab_size": 100}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TOWER = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
CLIP = CLIPVisionConfig(**TOWER, image_size=32, patch_size=8)
SIGLIP = SiglipVisionConfig(**TOWER, image_size=32, patch_size=8)
GRIDS = [[32, 64], [64, 64]]


def ids(multimodal: int) -> torch.Tensor:
    text = torch.randint(0, 80, (TEXT,), generator=torch.Generator().manual_seed(0))
    return torch.cat([text[:5], torch.full((multimodal,), IMAGE), text[5:]])[None]


def llava():
    # A head width that is not hidden_size / heads, as in Qwen3 or Mistral-Nemo.
    text = LlamaConfig(**SMALL, **HEADS, head_dim=24)
    config = LlavaConfig(
        vision_config=CLIP, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2
    )
    pixels = torch.randn(1, 3, 32, 32)
    return LlavaForConditionalGeneration(config), {"input_ids": ids(16), "pixel_values": pixels}


def llava_next():
    text = LlamaConfig(**SMALL, **HEADS)
    config = LlavaNextConfig(
        vision_config=CLIP, text_config=text, image_token_index=IMAGE, image_grid_pinpoints=GRIDS
    )
    inputs = {"pixel_values": torch.randn(1, 5, 3, 32, 32), "image_sizes": torch.tensor([[64, 64]])}
    return LlavaNextForConditionalGeneration(config), {"input_ids": ids(16 + 8 * 9), **inputs}


def llava_onevision():
    text = Qwen2Config(**SMALL, **HEADS)
    config = LlavaOnevisionConfig(
        vision_config=SIGLIP, text_config=text, image_token_index=IMAGE, image_grid_pinpoints=GRIDS
    )
    inputs = {"pixel_values": torch.randn(1, 3, 3, 32, 32), "image_sizes": torch.tensor([[32, 64]])}
    return LlavaOnevisionForConditionalGeneration(config), {"input_ids": ids(16 + 4 * 9), **inputs}


def qwen2_5_vl():
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
        "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = {**SMALL, **HEADS, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    inputs = {
        "pixel_values": torch.randn(8 * 12, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 8, 12]]),
        "mm_token_type_ids": (ids(24) == IMAGE).int(),
    }
    return Qwen2_5_VLForConditionalGeneration(config), {"input_ids": ids(24), **inputs}


def qwen2_audio():
    audio = {
        "num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64,
        "d_model": 32, "max_source_positions": 40,
    }  # fmt: skip
    config = Qwen2AudioConfig(
        audio_config=audio, text_config=Qwen2Config(**SMALL, **HEADS), audio_token_index=IMAGE
    )
    inputs = {
        "input_features": torch.randn(1, 16, 80),
        "feature_attention_mask": torch.ones(1, 80, dtype=torch.long),
        "attention_mask": torch.ones_like(ids(20)),
    }
    return Qwen2AudioForConditionalGeneration(config), {"input_ids": ids(20), **inputs}


FAMILIES = [llava, llava_next, llava_onevision, qwen2_5_vl, qwen2_audio]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def family(request):
    """A small model with random weights, its inputs, and how many of the prompt's tokens are multimodal."""
    torch.manual_seed(0)
    model, inputs = request.param()
    placeholder = torch.tensor(sorted(placeholder_token_ids(model.config)))
    return model.eval(), inputs, int(torch.isin(inputs["input_ids"], placeholder).sum())


def counted(model, inputs, **options) -> int:
    with torch.no_grad(), flop_counter() as counter:
        model(**inputs, **options)
    return counter.get_total_flops()


def test_eq5_gives_the_ratios_of_the_paper():
    def flops(insert_layer):
        return eq5_flops(32, 4096, 11008, 64, 576, insert_layer)

    ratios = [flops(layer) / flops(0) for layer in (4, 8, 12)]
    assert ratios == pytest.approx([0.887, 0.774, 0.661], abs=5e-4)


def test_prefill_agrees_with_the_counter_on_the_stock_model(family):
    model, inputs, multimodal = family
    cost = CostModel.from_model(model)
    expected = counted(model, inputs)
    assert cost.prefill_flops(TEXT, multimodal, 0) == pytest.approx(expected, rel=0.01)
    expected = counted(model, inputs, logits_to_keep=1)
    assert cost.prefill_flops(TEXT, multimodal, 0, logits_to_keep=1) == pytest.approx(expected, rel=0.01)


def test_prefill_agrees_with_the_counter_at_every_insert_layer(family):
    model, inputs, multimodal = family
    cost = CostModel.from_model(model)
    for insert_layer in range(1, cost.num_layers + 1):
        expected = counted(deep_insert(model, insert_layer), inputs)
        assert cost.prefill_flops(TEXT, multimodal, insert_layer) == pytest.approx(expected, rel=0.01)
    deep_insert(model, 0)


def test_a_measured_encoder_agrees_with_the_counted_one(family):
    model, inputs, multimodal = family
    measured = CostModel.from_model(model, inputs).encoder.flops(multimodal, 1)
    assert CostModel.from_model(model).encoder.flops(multimodal, 1) == pytest.approx(measured, rel=0.02)


def test_cache_bytes_are_those_of_the_cache(family):
    model, inputs, multimodal = family
    cost = CostModel.from_model(model)
    for insert_layer in (0, 2, cost.num_layers):
        with torch.no_grad():
            cache = deep_insert(model, insert_layer)(**inputs, use_cache=True).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert cost.kv_cache_bytes(TEXT, multimodal, insert_layer) == held
    deep_insert(model, 0)


def test_cache_bytes_follow_the_formula_and_the_precision():
    cost = CostModel.from_model(llava()[0].to(torch.bfloat16))
    assert cost.kv_cache_bytes(20, 16, 3) == 2 * 2 * 24 * 2 * (3 * 20 + 1 * 36)


def test_the_whole_saves_less_than_the_decoder_and_grows_with_the_layer():
    cost = CostModel.from_model(llava()[0])
    ratios = [cost.flops_ratio(64, 576, layer) for layer in range(cost.num_layers + 1)]
    assert ratios[0] == 1
    assert ratios == sorted(ratios, reverse=True)
    decoder = cost.decoder_flops(64, 576, 2) / cost.decoder_flops(64, 576, 0)
    assert decoder < ratios[2]
    # No multimodal token, nothing to skip and no encoder to run.
    assert cost.flops_ratio(64, 0, 3) == 1
    assert cost.prefill_flops(64, 0, 0) == cost.decoder_flops(64, 0, 0) + 64 * cost.head


def test_a_mixture_counts_the_experts_a_token_visits():
    from transformers import MixtralConfig

    text = MixtralConfig(**SMALL, **HEADS, num_local_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=CLIP, text_config=text, image_token_index=IMAGE)
    ).eval()
    dense = 2 * (64 * 64 * 2 + 64 * 32 * 2)
    expected = dense + 2 * 64 * 4 + 2 * 2 * 3 * 64 * 176
    assert CostModel.from_model(model).layers[0].per_row == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((10, 10, 5), "insert_layer 5: give a layer from 0 to 4"), ((0, 0, 0), "are no prompt")],
)
def test_impossible_prompts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CostModel.from_model(llava()[0]).prefill_flops(*arguments)
