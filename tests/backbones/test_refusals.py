"""Unsupported models and calls are refused with the reason and the remedy, and change no later forward."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
)
from transformers.cache_utils import Cache, DynamicLayer
from zoo import FAMILIES, LAYERS, TEXT, logits_of
from zoo.liquid_like import lfm2_vl

from deepinsert import UnsupportedCacheError
from deepinsert.backbones import UnsupportedModelError, deep_insert, insert_at, set_insert_layer


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


def test_a_failure_in_the_encoder_changes_no_later_forward(llava):
    inputs = FAMILIES["llava"].batch(llava, [(2, 0, 1)])
    tower = llava.model.vision_tower.register_forward_pre_hook(_out_of_memory)
    with pytest.raises(MemoryError):
        llava(**inputs)
    tower.remove()
    embeds = torch.randn(*inputs["input_ids"].shape, 32)
    with pytest.raises(ValueError, match="multimodal_mask"), insert_at(llava, 2):
        llava(inputs_embeds=embeds)


def _out_of_memory(module, args):
    """Fail as an encoder that does not fit into memory does."""
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


def test_convolutions_with_a_bias():
    """A row would get other logits beside a longer one, since a dummy would not be zero."""
    with pytest.raises(UnsupportedModelError, match="short convolutions with a bias"):
        deep_insert(lfm2_vl(conv_bias=True), 1)


def test_a_cache_that_cannot_skip(llava):
    """A cache layer of an unknown class is refused."""

    class UnknownLayer(DynamicLayer):
        pass

    inputs = FAMILIES["llava"].batch(llava, [(2, 0, 1)])
    cache = Cache(layers=[UnknownLayer() for _ in range(LAYERS)])
    with pytest.raises(UnsupportedCacheError, match="UnknownLayer"), insert_at(llava, 2):
        logits_of(llava, inputs, past_key_values=cache)
    assert logits_of(llava, inputs).isfinite().all()


def test_a_layer_called_by_itself(llava):
    """Outside of its stack it is unknown which rows wait, and the layer must not silently run as stock."""
    layer = llava.get_decoder().layers[0]
    with pytest.raises(UnsupportedModelError, match="outside of its stack"), insert_at(llava, 2):
        layer(torch.zeros(1, 3, 32), position_embeddings=(torch.zeros(1, 3, 8), torch.zeros(1, 3, 8)))


def test_router_logits():
    family = FAMILIES["qwen3_vl_moe"]
    model = deep_insert(family.model(), 0)
    inputs = family.batch(model)
    assert model(**inputs, output_router_logits=True).aux_loss.isfinite()
    with insert_at(model, 2), pytest.raises(ValueError, match="output_router_logits needs insert layer 0"):
        model(**inputs, output_router_logits=True)


def test_a_prompt_whose_rows_the_attention_numbers():
    """Llama 4 scales queries by row number from `floor_scale` on, which is wrong if rows are missing."""
    family = FAMILIES["llama4"]
    model = family.model()
    inputs = family.batch(model, only=0)
    model.get_decoder().model.config.floor_scale = inputs["input_ids"].shape[1]
    deep_insert(model, 2)
    with pytest.raises(UnsupportedModelError, match="insert at layer 0"):
        logits_of(model, inputs)
    with insert_at(model, 0):
        logits_of(model, inputs)
