"""Encoder-decoders, in the shapes of use in which an encoder differs from a decoder stack."""

from __future__ import annotations

import copy

import pytest
import torch
from zoo import FAMILIES, LAYERS, Family, logits_of

from deepinsert.backbones import UnsupportedModelError, deep_insert, insert_at
from deepinsert.backbones.costs.cost_model import CostModel

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


@pytest.fixture(scope="module", params=["florence2", "t5gemma2"])
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def stock(family):
    return family.model()


@pytest.fixture(scope="module")
def inserted(stock):
    return deep_insert(copy.deepcopy(stock), 0)


def without_mask(inputs):
    """Return the inputs without an attention mask."""
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


def with_start_token(inputs):
    """Add a start token for the decoder, which is then the same with and without padding."""
    return inputs | {"decoder_input_ids": inputs["input_ids"].new_ones(len(inputs["input_ids"]), 1)}


def test_no_mask_means_that_all_rows_see_each_other(family, stock, inserted):
    """Rows of one length have different numbers of image tokens, and there is no mask to select rows from."""
    image = len(family.media(stock, [[0]]).tokens[0])
    rows = [(3, 0, 4), (7 + image,), (0, 7)]
    inputs = without_mask(family.batch(stock, rows))
    for layer in range(LAYERS + 1):
        with insert_at(inserted, layer):
            together = logits_of(inserted, inputs)
            for row in range(len(rows)):
                alone = logits_of(inserted, without_mask(family.batch(stock, rows, only=row)))
                torch.testing.assert_close(together[row], alone[0], **TOLERANCE)


def test_generation_starts_from_the_same_encoder_output(family, stock, inserted):
    """Tokens equal the forward's, and beams those of a row alone, though `generate` calls the encoder."""
    depths = [2, LAYERS, 1, 3]
    for row, depth in enumerate(depths):
        inputs = family.batch(stock, only=row)
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        with insert_at(inserted, depth), torch.no_grad():
            greedy = inserted.generate(**inputs, **options)
            decoder_inputs = {"decoder_input_ids": greedy[:, :-1]}
            scores = logits_of(inserted, inputs | decoder_inputs)[0, -3:]
            scores[:, inserted.generation_config.suppress_tokens] = -torch.inf
            assert torch.equal(scores.argmax(-1), greedy[0, -3:])
    with insert_at(inserted, depths), torch.no_grad():
        together = inserted.generate(**with_start_token(family.batch(stock)), **options, num_beams=2)
    for row, depth in enumerate(depths):
        with insert_at(inserted, depth), torch.no_grad():
            row_inputs = with_start_token(family.batch(stock, only=row))
            alone = inserted.generate(**row_inputs, **options, num_beams=2)
        assert torch.equal(together[row], alone[0])


def test_costs_are_refused_instead_of_counting_the_encoder_alone(stock):
    with pytest.raises(UnsupportedModelError, match="not counted yet"):
        CostModel.from_model(stock)
