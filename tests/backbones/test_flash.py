"""Flash attention, which takes no 4-D mask: plain functions stand for its kernels, which need a GPU."""

from __future__ import annotations

import pytest
import torch
import transformers.integrations.flash_attention as flash_integration
import transformers.modeling_flash_attention_utils as flash_utils
from batches import DEPTHS, ROWS
from test_caches import SLIDING
from zoo import FAMILIES, logits_of

from deepinsert.backbones import UnsupportedModelError, deep_insert, insert_at


def attend(query, key, value, scale, causal, window):
    """Return the attention output (Q, H, D) of one sequence; the window is counted in the K keys.

    Args:
        query: (Q, H, D).
        key: (K, H', D), where H' divides H.
        value: (K, H', D).
        scale: The factor on the scores.
        causal: Whether each query attends to earlier keys only.
        window: How many earlier keys a query attends to, as the first of two numbers; -1 means all.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    last = torch.arange(len(query))[:, None] + len(key) - len(query)
    place = torch.arange(len(key))[None, :]
    visible = (place <= last) | torch.tensor(not causal)
    if window[0] >= 0:
        visible &= place >= last - window[0]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -1e9).softmax(-1), value)


def flash(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    """Compute what flash-attn's function for padded batches computes, with its arguments."""
    parts = zip(q, k, v, strict=True)
    return torch.stack([attend(*part, softmax_scale, causal, window_size) for part in parts])


def varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
):
    """Compute what flash-attn's function for packed sequences computes, with its arguments."""
    sizes = [cu.diff().tolist() for cu in (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)]
    parts = zip(*(x.split(size) for x, size in zip((q, k, v), sizes, strict=True)), strict=True)
    return torch.cat([attend(*part, softmax_scale, causal, window_size) for part in parts])


@pytest.fixture
def flash_model(monkeypatch):
    """Return a function that builds a family's model with plain functions as FlashAttention's kernels."""
    decoding = [None] if hasattr(flash_utils, "_flash_with_kvcache_fn") else []  # since 5.4
    kernels = (flash, varlen, *decoding, flash_utils._pad_input, flash_utils._unpad_input)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *args, **kwargs: kernels)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    monkeypatch.setattr(flash_integration, "_use_top_left_mask", False)

    def build(family):
        model = deep_insert(family.model(), 0)
        model.config.get_text_config()._attn_implementation_internal = "flash_attention_2"
        assert model.get_decoder().config._attn_implementation == "flash_attention_2"
        return model

    return build


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("layers", [3, DEPTHS], ids=["one layer", "layer per row"])
def test_logits_and_tokens(flash_model, layers, padding):
    family = FAMILIES["llava"]
    model, plain = flash_model(family), deep_insert(family.model(), 0)
    inputs = family.batch(model, ROWS, padding)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    results = []
    for one in (model, plain):
        with insert_at(one, layers), torch.no_grad():
            results.append((logits_of(one, inputs), one.generate(**inputs, **options)))
    (logits, tokens), (expected, expected_tokens) = results
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=1e-5)
    assert padding == "right" or torch.equal(tokens, expected_tokens)


@pytest.mark.parametrize("rows", [[(3, 0, 4), (0, 3)], [(0, 4), (2, 0, 3)], [(3, 0), (0, 2)]])
def test_packed_rows_do_not_see_each_other(flash_model, rows):
    """This includes sequences that start with an image, whose first position waits below the insert layer."""
    family = FAMILIES["llava"]
    model = flash_model(family)
    alone = [family.batch(model, rows, only=row) for row in range(2)]
    ids = [inputs["input_ids"] for inputs in alone]
    packed = {
        "input_ids": torch.cat(ids, dim=1),
        "position_ids": torch.cat([torch.arange(sequence.shape[1]) for sequence in ids])[None],
        "pixel_values": torch.cat([inputs["pixel_values"] for inputs in alone]),
    }
    with insert_at(model, 3):
        logits = logits_of(model, packed, use_cache=False)
        expected = torch.cat([logits_of(model, inputs) for inputs in alone], dim=1)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_window_that_the_kernel_would_count_in_rows_is_refused(flash_model):
    model = flash_model(SLIDING)
    inputs = SLIDING.batch(model, ROWS)
    with insert_at(model, 3), pytest.raises(UnsupportedModelError, match="window of 6 positions"):
        logits_of(model, inputs)
    with insert_at(model, 0):
        logits_of(model, inputs)
