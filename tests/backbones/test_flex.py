"""Flex attention, whose masks are functions: the same logits and tokens as with eager attention."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import StaticCache
from zoo import FAMILIES, logits_of, skip_here

from deepinsert import UnsupportedCacheError
from deepinsert.backbones import deep_insert, insert_at

OPTIONS = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module", params=["llava", "gemma3", "mistral3"])
def family(request):
    """Gemma 3 makes its masks before the stack, with windows and images that see themselves."""
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def eager(family):
    return deep_insert(family.model(attention="eager"), 0)


@pytest.fixture(scope="module")
def flex(family):
    model = deep_insert(family.model(), 0)
    model.set_attn_implementation({"text_config": "flex_attention"})
    assert model.get_decoder().config._attn_implementation == "flex_attention"
    return model


@pytest.mark.parametrize("layers", [0, 2, 4, [2, 4, 1, 3]], ids=["stock", "middle", "never", "layer per row"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_logits(family, eager, flex, layers, padding):
    inputs = family.batch(eager, padding=padding)
    real = inputs["attention_mask"].bool()
    with torch.compiler.set_stance("force_eager"), insert_at(eager, layers), insert_at(flex, layers):
        got, expected = logits_of(flex, inputs), logits_of(eager, inputs)
    torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [2, [2, 4, 1, 3]], ids=["one layer", "layer per row"])
def test_generation(family, eager, flex, layers):
    inputs = family.batch(eager)
    with torch.compiler.set_stance("force_eager"), torch.no_grad(), insert_at(flex, layers):
        tokens = flex.generate(**inputs, **OPTIONS)
    with torch.no_grad(), insert_at(eager, layers):
        assert torch.equal(tokens, eager.generate(**inputs, **OPTIONS))


@pytest.mark.slow
def test_compiled(family, eager, flex):
    """With fixed shapes: inductor's C++ for shapes that change does not compile in torch 2.13."""
    inputs = family.batch(eager)
    real = inputs["attention_mask"].bool()
    torch.compiler.reset()
    with (
        torch._dynamo.config.patch(automatic_dynamic_shapes=False),
        insert_at(eager, 2),
        insert_at(flex, 2),
    ):
        got, expected = logits_of(flex, inputs), logits_of(eager, inputs)
    torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-5)


def test_static_cache(family, eager, flex):
    """Which the stock `generate` does not make together with flex attention."""
    inputs = family.batch(eager)
    cache = StaticCache(config=flex.config.get_text_config(), max_cache_len=40)
    with torch.compiler.set_stance("force_eager"):
        try:
            logits_of(flex, inputs, past_key_values=copy.deepcopy(cache), use_cache=True)
        except Exception as error:
            skip_here(f"the stock model fails with a static cache and flex attention: {error}")
    with (
        pytest.raises(UnsupportedCacheError, match=r"'flex_attention'.*DynamicCache"),
        torch.compiler.set_stance("force_eager"),
        insert_at(flex, 2),
    ):
        logits_of(flex, inputs, past_key_values=cache, use_cache=True)
