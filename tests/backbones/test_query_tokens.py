"""Models that embed the prompt and pass it to the `generate` of their language model."""

from __future__ import annotations

import copy

import pytest
import torch
from zoo import FAMILIES, LAYERS, WORDS, Family, logits_of

from deepinsert.backbones import deep_insert, insert_at

OPTIONS = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module", params=["blip-2", "instructblip"])
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def inserted(family):
    return deep_insert(copy.deepcopy(family.model()), 0)


@pytest.mark.parametrize("layer", [1, LAYERS])
def test_generated_tokens_are_those_of_the_forward(family, inserted, layer):
    inputs = family.batch(inserted, only=2)
    with insert_at(inserted, layer), torch.no_grad():
        tokens = inserted.generate(**inputs, **OPTIONS)
        ids = tokens[:, :-1]
        recomputed = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        scores = logits_of(inserted, recomputed)[0, -3:]
    scores[:, : WORDS.start] = -torch.inf
    assert torch.equal(scores.argmax(-1), tokens[0, -3:])


def test_beams_have_the_insert_layer_of_their_row(family, inserted):
    depths = [2, LAYERS, 1, 3]
    with insert_at(inserted, depths):
        together = inserted.generate(**family.batch(inserted), **OPTIONS, num_beams=2)
    for row, depth in enumerate(depths):
        with insert_at(inserted, depth):
            alone = inserted.generate(**family.batch(inserted, only=row), **OPTIONS, num_beams=2)
        assert torch.equal(together[row, -3:], alone[0, -3:])
