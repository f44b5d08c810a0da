"""What cannot be done is refused with the reason and the remedy, and nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, LAYERS, TEXT, VISION, logits_of
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    StaticCache,
)

from backbones import UnsupportedModelError, deep_insert, insert_at, set_insert_layer
from backbones.cache import UnsupportedCacheError


@pytest.fixture(scope="module")
def llava():
    return deep_insert(FAMILIES["llava"].model())


@pytest.mark.parametrize("layer", [-1, LAYERS + 1, [0, LAYERS + 1], []])
def test_a_layer_the_model_does_not_have(llava, layer):
    with pytest.raises(ValueError, match=f"0 .stock. to {LAYERS}"), insert_at(llava, layer):
        pass
    with pytest.raises(ValueError, match=f"0 .stock. to {LAYERS}"):
        set_insert_layer(llava, LAYERS + 1)


def test_a_refused_layer_leaves_the_model_stock():
    model = FAMILIES["llava"].model()
    for layer, error in ((99, ValueError), (3.7, TypeError)):
        with pytest.raises(error):
            deep_insert(model, layer)
        assert not hasattr(model.config, "deepinsert")
        assert not model.model.language_model._forward_pre_hooks


def test_a_failure_in_the_encoder_leaves_nothing_behind(llava):
    inputs = FAMILIES["llava"].batch(llava, [(2, 0, 1)])
    tower = llava.model.vision_tower.register_forward_pre_hook(_out_of_memory)
    with pytest.raises(MemoryError):
        llava(**inputs)
    tower.remove()
    embeds = torch.randn(*inputs["input_ids"].shape, 32)
    with pytest.raises(ValueError, match="multimodal_mask"), insert_at(llava, 2):
        llava(inputs_embeds=embeds)


def _out_of_memory(module, args):
    raise MemoryError


def test_layers_that_do_not_fit_the_batch(llava):
    inputs = FAMILIES["llava"].batch(llava, [(2, 0, 1)] * 3)
    with pytest.raises(ValueError, match="2 insert layers for a batch of 3 rows"), insert_at(llava, [1, 2]):
        llava(**inputs)
    with insert_at(llava, [1, 2, 3]):
        assert logits_of(llava, inputs).isfinite().all()


def test_a_text_only_model():
    with pytest.raises(UnsupportedModelError, match="no placeholder tokens"):
        deep_insert(LlamaForCausalLM(LlamaConfig(**TEXT)), 1)


def test_an_encoder_decoder():
    config = BartConfig(
        vocab_size=60,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        deep_insert(BartForConditionalGeneration(config), 1)


def test_cross_attention():
    text = {
        **TEXT,
        "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    vision = {
        "hidden_size": 32,
        "image_size": 16,
        "patch_size": 8,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 4,
        "intermediate_size": 32,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
    }
    model = MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision))
    with pytest.raises(UnsupportedModelError, match="cross-attention"):
        deep_insert(model, 1)


def test_deepstack():
    text = {
        **TEXT,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 4,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
    }
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision))
    with pytest.raises(UnsupportedModelError, match="DeepStack"):
        deep_insert(model, 1)


@pytest.mark.parametrize("rows", [[(2, 0, 1)], [(2, 0, 1), (3,)]], ids=["one row", "ragged"])
def test_a_cache_that_cannot_skip(llava, rows):
    inputs = FAMILIES["llava"].batch(llava, rows)
    cache = StaticCache(config=llava.config.get_text_config(), max_cache_len=32)
    with pytest.raises(UnsupportedCacheError, match="DynamicCache"), insert_at(llava, 2), torch.no_grad():
        llava(**inputs, past_key_values=cache)
    assert VISION["image_size"] == 16 and logits_of(llava, inputs).isfinite().all()
