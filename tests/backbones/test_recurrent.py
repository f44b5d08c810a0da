"""Layers that carry a state from row to row, over several forwards on one cache."""

from __future__ import annotations

import pytest
import torch
from zoo import FAMILIES, skip_here, skip_where_stock_differs, skipping_what_is_missing

from deepinsert import UnsupportedCacheError
from deepinsert.backbones import deep_insert, insert_at


@pytest.fixture(scope="module")
def family():
    return FAMILIES["qwen3_5"]


@pytest.fixture(scope="module")
def model(family):
    with skipping_what_is_missing():
        return deep_insert(family.model(), 0)


def second_turn_logits(family, model, rows, first):
    """Return the logits of a second turn, with images, behind a first turn of `first` text positions."""
    inputs = family.batch(model, rows)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions, _ = model.model.get_rope_index(
        ids, inputs["mm_token_type_ids"], inputs["image_grid_thw"], attention_mask=mask
    )
    with torch.no_grad():
        cache = model(
            input_ids=ids[:, :first], attention_mask=mask[:, :first], position_ids=positions[..., :first]
        ).past_key_values
        later = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
        return model(
            input_ids=ids[:, first:],
            attention_mask=mask,
            position_ids=positions[..., first:],
            past_key_values=cache,
            **later,
        ).logits


def test_an_image_in_a_later_turn(family, model):
    rows = [(3, 4, 0, 2)]
    with insert_at(model, 0), torch.no_grad():
        stock = model(**family.batch(model, rows)).logits[:, 4:]
        if not torch.allclose(second_turn_logits(family, model, rows, first=4), stock, atol=1e-3):
            skip_here("the stock model forgets its state where a later turn has several tokens")
    with insert_at(model, 3), torch.no_grad():
        whole = model(**family.batch(model, rows)).logits
        later = second_turn_logits(family, model, rows, first=4)
    torch.testing.assert_close(later, whole[:, 4:], atol=2e-5, rtol=2e-5)


def test_dummies_never_follow_a_state(family, model):
    """Rows with different numbers of words in the later turn would need dummies, which change the state."""
    rows = [(4, 0, 3), (3, 1, 0, 7)]
    with insert_at(model, 3), pytest.raises(UnsupportedCacheError, match="recurrent state"):
        second_turn_logits(family, model, rows, first=4)


@pytest.mark.parametrize("size", [2, 5])
def test_a_chunk_of_image_tokens_alone_leaves_the_state_as_it_is(family, model, size):
    inputs = family.batch(model, [(3, 0, 4)])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    skip_where_stock_differs(model, inputs, {"prefill_chunk_size": size}, **options)
    with insert_at(model, 3), torch.no_grad():
        whole = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, prefill_chunk_size=size), whole)
