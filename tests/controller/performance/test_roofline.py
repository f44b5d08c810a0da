"""Predicted times equal a calculation by hand for LLaVA-1.5-7B, the paper's figures, and their limits."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlavaConfig, Qwen2_5_VLConfig

from deepinsert.backbones import CostModel
from deepinsert.controller.performance.roofline import DEVICES, Device, device_named, measure_cpu, predict

TEXT, IMAGE = 64, 576
A100 = DEVICES["A100-40"]


def llava(**text) -> CostModel:
    """Return the costs of LLaVA-1.5-7B by its published configuration, without a download."""
    tower = {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336,
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
    }  # fmt: skip
    language = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, **text}
    return CostModel.from_config(LlavaConfig(text_config=language, vision_config=tower), torch.float16)


@pytest.fixture(scope="module")
def costs() -> CostModel:
    return llava()


def test_published_models_have_their_published_sizes(costs):
    """7.06, 13.35 and 8.29 billion weights of two bytes each."""
    assert costs.weight_bytes / 2 == pytest.approx(7.063e9, rel=1e-3)
    wide = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
    larger = llava(**wide, num_attention_heads=40, num_key_value_heads=40)
    assert larger.weight_bytes / 2 == pytest.approx(13.35e9, rel=1e-3)
    text = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064,
    }  # fmt: skip
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}
    qwen = CostModel.from_config(Qwen2_5_VLConfig(text_config=text, vision_config=vision), torch.bfloat16)
    assert qwen.weight_bytes / 2 == pytest.approx(8.292e9, rel=1e-3)
    # Keys and values of 4 heads of 128 numbers in 28 layers, two bytes each.
    assert qwen.kv_cache_bytes(100, 1000, 28) == 100 * 2 * 4 * 128 * 28 * 2


def test_the_paper_s_ratios_come_out_of_a_configuration(costs):
    """Eq. (5) allows 0.887, 0.774, 0.661 (0.0003 less or more with a gated MLP)."""
    stock = costs.decoder_flops(TEXT, IMAGE, 0)
    ratios = [costs.decoder_flops(TEXT, IMAGE, layer) / stock for layer in (4, 8, 12)]
    assert ratios == pytest.approx([0.887, 0.774, 0.661], abs=1e-3)
    predictions = [predict(costs, A100, TEXT, IMAGE, layer) for layer in (4, 8, 12)]
    assert [prediction.kv_cache_ratio for prediction in predictions] == pytest.approx([0.8875, 0.775, 0.6625])
    # The paper measured 0.928, 0.881, 0.836; reading the weights for 64 tokens explains a part of the excess.
    times = [prediction.prefill_ratio for prediction in predictions]
    assert all(
        allowed < time < measured
        for allowed, time, measured in zip(ratios, times, (0.928, 0.881, 0.836), strict=True)
    )


def test_a_prefill_worked_by_hand(costs):
    """At insert layer 32 all layers see text only, and the time is that of reading the weights."""
    matrices = 4 * 4096**2 + 3 * 4096 * 11008
    weights = 2 * (matrices + 2 * 4096)  # and two norms
    wide = 2 * matrices * 640 / 312e12
    # Each row is read and written by q, k, v, o, by gate and up, and by down.
    row = 4 * (4096 + 4096) + 3 * (4096 + 11008)
    narrow = (weights + 64 * row * 2) / 1555e9
    attention = 640 * 640 * 4 * 4096 / 312e12
    small = 64 * 4 * 4096 * 2 / 1555e9  # queries, outputs, keys, values of 64 tokens
    encoder = costs.encoder.flops(576, 1) / 312e12
    head = 2 * 4096 * 32064 / 1555e9
    for layer in (0, 12, 32):
        seconds = encoder + head + layer * (narrow + small) + (32 - layer) * (wide + attention)
        prefill = predict(costs, A100, TEXT, IMAGE, layer, efficiency=1).prefill
        assert prefill.ms == pytest.approx(1000 * seconds, rel=1e-6)
        assert prefill.bound == ("memory" if layer == 32 else "compute")


def test_a_decoded_token_worked_by_hand(costs):
    """Weights of all layers and the head, and the cache, are read once: FLOPs hardly matter."""
    weights = 32 * 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 4096 * 32064
    for layer in (0, 12):
        tokens = 12 * (64 if layer else 640) + 20 * 640
        cache = tokens * 2 * 4096 * 2
        prediction = predict(costs, A100, TEXT, IMAGE, layer, efficiency=1)
        decode = prediction.decode
        assert prediction.kv_cache_bytes == cache
        assert prediction.memory_bytes == costs.weight_bytes + cache and prediction.fits
        assert decode.ms == pytest.approx(1000 * (weights + cache) / 1555e9, rel=2e-3)
        assert decode.bound == "memory" and decode.intensity == pytest.approx(1, abs=0.05)
    assert prediction.decode_ratio == pytest.approx(0.991, abs=1e-3)


def test_without_a_limit_on_memory_the_flops_alone_decide(costs):
    fast = Device("fast memory", {"float16": 1e12}, 1e30, math.inf)
    for layer in (0, 8, 32):
        prediction = predict(costs, fast, TEXT, IMAGE, layer)
        flops_ratio = costs.flops_ratio(TEXT, IMAGE, layer, logits_to_keep=1)
        assert prediction.prefill_ratio == pytest.approx(prediction.flops_ratio)
        assert prediction.flops_ratio == pytest.approx(flops_ratio)
        assert prediction.prefill.bound == prediction.decode.bound == "compute"


def test_ratios_do_not_depend_on_the_efficiency_and_grow_with_the_batch(costs):
    half, whole = (predict(costs, A100, TEXT, IMAGE, 12, efficiency=share) for share in (0.5, 1))
    assert half.prefill.ms == pytest.approx(2 * whole.prefill.ms)
    assert (half.prefill_ratio, half.decode_ratio) == pytest.approx((whole.prefill_ratio, whole.decode_ratio))
    # The more rows share one read of the weights, the more of the saved FLOPs and cache becomes saved time.
    batches = [predict(costs, A100, TEXT, IMAGE, 12, batch=rows) for rows in (1, 4, 16, 64)]
    for name in ("prefill_ratio", "decode_ratio"):
        ratios = [getattr(prediction, name) for prediction in batches]
        assert ratios == sorted(ratios, reverse=True)
    assert batches[-1].prefill_ratio == pytest.approx(batches[-1].flops_ratio, abs=0.01)
    assert batches[-1].kv_cache_bytes == 64 * batches[0].kv_cache_bytes
    assert batches[0].fits and not predict(costs, A100, TEXT, IMAGE, 0, batch=128).fits


def test_a_prompt_without_text_or_without_images_has_a_time(costs):
    assert predict(costs, A100, 64, 0, 12).prefill_ratio == 1
    assert 0 < predict(costs, A100, 0, 576, 12).prefill_ratio < 1


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("h100", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla T4", "T4"),
    ],
)
def test_devices_are_found_by_the_names_that_torch_gives_them(name, device):
    assert device_named(name).name == device


def test_this_machine_is_measured():
    device = measure_cpu(size=256, repeats=2)
    assert device.peak(torch.float32) > 1e8 and device.bandwidth > 1e7 and device.memory > 1e8


def test_what_cannot_be_predicted_is_named(costs):
    with pytest.raises(ValueError, match=r"'H100 PCIe' is not in the table: choose A100-40, .* or cpu"):
        device_named("H100 PCIe")
    with pytest.raises(ValueError, match="T4 has no figure for bfloat16: choose the dtype among float16"):
        DEVICES["T4"].peak(torch.bfloat16)
    with pytest.raises(ValueError, match="efficiency 0: give a share"):
        predict(costs, A100, TEXT, IMAGE, 0, efficiency=0)
    with pytest.raises(ValueError, match="batch 0: give at least 1"):
        predict(costs, A100, TEXT, IMAGE, 0, batch=0)
    with pytest.raises(ValueError, match="insert_layer 33: give a layer from 0 to 32"):
        predict(costs, A100, TEXT, IMAGE, 33)
