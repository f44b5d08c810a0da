"""Flex attention, whose masks are functions, gives the logits and tokens of eager attention."""

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
    """Return the family; Gemma 3 builds its masks before the stack, with windows and bidirectional images."""
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
        logits, expected = logits_of(flex, inputs), logits_of(eager, inputs)
    torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [2, [2, 4, 1, 3]], ids=["one layer", "layer per row"])
def test_generation(family, eager, flex, layers):
    inputs = family.batch(eager)
    with torch.compiler.set_stance("force_eager"), torch.no_grad(), insert_at(flex, layers):
        tokens = flex.generate(**inputs, **OPTIONS)
    with torch.no_grad(), insert_at(eager, layers):
        assert torch.equal(tokens, eager.generate(**inputs, **OPTIONS))


@pytest.mark.slow
def test_compiled(family, eager, flex):
    """Shapes are fixed, since inductor's C++ for changing shapes does not compile in torch 2.13."""
    inputs = family.batch(eager)
    real = inputs["attention_mask"].bool()
    torch.compiler.reset()
    with (
        torch._dynamo.config.patch(automatic_dynamic_shapes=False),
        insert_at(eager, 2),
        insert_at(flex, 2),
    ):
        logits, expected = logits_of(flex, inputs), logits_of(eager, inputs)
    torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=1e-5)


def test_a_static_cache_is_refused(family, eager, flex):
    """The stock `generate` makes no static cache for flex attention, so the forward is called with one."""
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
