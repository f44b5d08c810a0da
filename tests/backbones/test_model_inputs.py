"""A model with an insert layer finds the multimodal tokens in all inputs that its stock model takes."""

from __future__ import annotations

import pytest
import torch
from batches import ROWS
from zoo import FAMILIES, logits_of

from deepinsert.backbones import deep_insert, insert_at


@pytest.mark.parametrize("name", ["token_type_ids", "mm_token_type_ids"])
def test_token_types_from_a_tokenizer_change_nothing(family, stock, inserted, name):
    inputs = family.batch(stock, ROWS, "left")
    with insert_at(inserted, 3):
        expected = logits_of(inserted, inputs)
        logits = logits_of(inserted, {name: torch.zeros_like(inputs["input_ids"]), **inputs})
    assert torch.equal(logits, expected)


def test_embeddings_instead_of_ids_with_a_mask():
    family = FAMILIES["llava"]
    model = deep_insert(family.model(), 3)
    inputs = family.batch(model, ROWS[:1], "left")
    expected = logits_of(model, inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    features = torch.cat(model.model.get_image_features(inputs["pixel_values"]).pooler_output)
    multimodal = family.multimodal(inputs["input_ids"])
    embeds = embeds.masked_scatter(multimodal[..., None], features).detach()
    mask = inputs["attention_mask"]
    with insert_at(model, 3, multimodal_mask=multimodal):
        logits = logits_of(model, {"inputs_embeds": embeds, "attention_mask": mask})
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="multimodal_mask"):
        model(inputs_embeds=embeds.clone(), attention_mask=mask)
    with (
        pytest.raises(ValueError, match="one value per position"),
        insert_at(model, 3, multimodal_mask=multimodal[:, 1:]),
    ):
        model(inputs_embeds=embeds, attention_mask=mask)
    # The error must not change later forwards.
    assert torch.equal(logits_of(model, inputs), expected)


def test_embeddings_of_another_prompt_are_not_taken_for_those_of_this_one():
    """Two prompts of one length are embedded before the model gets the first."""
    family = FAMILIES["llava"]
    model = deep_insert(family.model(), 3)
    with torch.no_grad():
        first, second = (
            model.get_input_embeddings()(family.batch(model, rows)["input_ids"]).clone()
            for rows in ([(3, 0, 4)], [(0, 7)])
        )
        assert first.shape == second.shape
        with pytest.raises(ValueError, match="multimodal_mask"):
            model(inputs_embeds=first)


def test_a_packed_batch_with_its_own_mask_and_positions():
    """One row holds two questions on one image, with a 4-D mask and positions that restart."""
    family = FAMILIES["llava"]
    model = deep_insert(family.model(), 3)
    one = family.batch(model, [(2, 0, 4)], "left")
    ids = one["input_ids"][0]
    prefix, question = ids[:6], ids[6:]
    other = (question + 1).clamp(max=59)
    packed = torch.cat([prefix, question, other])[None]
    positions = torch.cat([torch.arange(10), torch.arange(6, 10)])[None]
    allowed = torch.ones(14, 14, dtype=torch.bool).tril()
    allowed[10:, 6:10] = False
    logits = logits_of(
        model,
        {
            "input_ids": packed,
            "pixel_values": one["pixel_values"],
            "attention_mask": allowed[None, None],
            "position_ids": positions,
        },
    )[0]
    for words, place in ((question, slice(6, 10)), (other, slice(10, 14))):
        single = {
            "input_ids": torch.cat([prefix, words])[None],
            "attention_mask": torch.ones(1, 10, dtype=torch.long),
            "pixel_values": one["pixel_values"],
        }
        torch.testing.assert_close(logits[place], logits_of(model, single)[0, 6:], atol=1e-5, rtol=1e-5)


def test_a_cache_position_from_older_loops_changes_nothing():
    family = FAMILIES["llava"]
    model = deep_insert(family.model(), 3)
    inputs = family.batch(model, ROWS, "left")
    positions = torch.arange(inputs["input_ids"].shape[1])
    assert torch.equal(logits_of(model, inputs, cache_position=positions), logits_of(model, inputs))
