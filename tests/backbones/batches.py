"""Batches, insert layers and comparisons that several test files share."""

from __future__ import annotations

from reference import reference_logits
from zoo import logits_of

ROWS = [(3, 0, 4), (5,), (2, 0, 3, 0, 2), (0, 6)]
"""A ragged batch with one, no and two images; one of its images begins a row."""

LONGER_ROWS = [*ROWS[:3], (0, 9)]
"""The same with a longer last row."""

DEPTHS = [2, 4, 1, 3]
"""An insert layer for each row of such a batch."""


def depths_of(family, count):
    """Return an insert layer for each of `count` rows, shallow and deep ones mixed."""
    deepest = family.deepest
    return [(2, deepest, 1, deepest - 1)[row % 4] for row in range(count)]


def reference_of(plain, inputs, family, layer):
    """Return the reference's logits of a single row; `plain` is a stock model with eager attention."""
    multimodal = family.multimodal(inputs["input_ids"])[0]
    return reference_logits(plain, plain.get_decoder().layers, inputs, layer, multimodal)


def real_logits(model, inputs, row):
    """Return the logits of one row of a batch, without its padding."""
    return logits_of(model, inputs)[row][inputs["attention_mask"][row].bool()]
