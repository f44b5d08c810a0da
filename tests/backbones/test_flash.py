"""Flash attention kernels, which take no 4-D mask: a plain copy of what they compute, as they need a GPU."""

from __future__ import annotations

import pytest
import torch
import transformers.integrations.flash_attention as flash_integration
import transformers.modeling_flash_attention_utils as flash_utils
from test_caches import SLIDING
from zoo import FAMILIES, logits_of

from deepinsert.backbones import UnsupportedModelError, deep_insert, insert_at

ROWS = [(3, 0, 4), (5,), (2, 0, 3, 0, 2), (0, 6)]
DEPTHS = [2, 4, 1, 3]


def attend(query, key, value, scale, causal, window):
    """(Q, H, D) of one sequence; the window is counted in the keys that are given."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    last = torch.arange(len(query))[:, None] + len(key) - len(query)
    place = torch.arange(len(key))[None, :]
    seen = (place <= last) | torch.tensor(not causal)
    if window[0] >= 0:
        seen &= place >= last - window[0]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -1e9).softmax(-1), value)


def flash(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
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
    sizes = [cu.diff().tolist() for cu in (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)]
    parts = zip(*(x.split(size) for x, size in zip((q, k, v), sizes, strict=True)), strict=True)
    return torch.cat([attend(*part, softmax_scale, causal, window_size) for part in parts])


@pytest.fixture
def flashed(monkeypatch):
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
def test_logits_and_tokens(flashed, layers, padding):
    family = FAMILIES["llava"]
    model, plain = flashed(family), deep_insert(family.model(), 0)
    inputs = family.batch(model, ROWS, padding)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    found = []
    for one in (model, plain):
        with insert_at(one, layers), torch.no_grad():
            found.append((logits_of(one, inputs), one.generate(**inputs, **options)))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[0][0][real], found[1][0][real], atol=1e-5, rtol=1e-5)
    assert padding == "right" or torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("rows", [[(3, 0, 4), (0, 3)], [(0, 4), (2, 0, 3)], [(3, 0), (0, 2)]])
def test_packed_rows_stay_apart(flashed, rows):
    """Also where a sequence starts with an image, whose first position is in no layer below."""
    family = FAMILIES["llava"]
    model = flashed(family)
    alone = [family.batch(model, rows, only=row) for row in range(2)]
    ids = [own["input_ids"] for own in alone]
    packed = {
        "input_ids": torch.cat(ids, dim=1),
        "position_ids": torch.cat([torch.arange(own.shape[1]) for own in ids])[None],
        "pixel_values": torch.cat([own["pixel_values"] for own in alone]),
    }
    with insert_at(model, 3):
        got = logits_of(model, packed, use_cache=False)
        expected = torch.cat([logits_of(model, own) for own in alone], dim=1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_window_that_the_kernel_would_measure_in_rows(flashed):
    model = flashed(SLIDING)
    inputs = SLIDING.batch(model, ROWS)
    with insert_at(model, 3), pytest.raises(UnsupportedModelError, match="window of 6 positions"):
        logits_of(model, inputs)
    with insert_at(model, 0):
        logits_of(model, inputs)
