"""DeepInsert on an unmodified `transformers` model: below layer L only text rows exist (paper, section 3).

The stock forward computes everything at full length: embeddings, scattered features, positions, masks. Each
decoder layer's call is then given the rows that are alive in it. At layer L the multimodal rows join as they
were when they entered layer 0; after the last layer all rows are put back. No weight, no module and no class
name changes, so `state_dict`, `generate`, Trainer and PEFT see the stock model.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from deepinsert.backbones.families import base_model_of, find_stack
from deepinsert.backbones.refusals import check_runs, check_supported

from .forward_state import Override
from .routing import ATTRIBUTE, Insertion
from .self_check import check_versions

CONFIG_KEY = "deepinsert"

InsertLayer = int | Sequence[int]


def deep_insert(model: Any, insert_layer: int | None = None) -> Any:
    """Let multimodal tokens skip the first `insert_layer` decoder layers of `model`, in place.

    `insert_layer` is 0 (the stock model) to N (they never enter); None takes the one in `model.config`,
    else 0. It is written to `model.config.deepinsert`, so `save_pretrained` keeps it. Returns `model`, whose
    class, parameters and `state_dict` are unchanged; a PEFT model is changed through its base model.

    Under a version of transformers or torch that nobody has tried, the first call tries the mechanism on a
    model of a few thousand weights, and raises `UntriedVersionError` where a number is wrong.

    Raises `UnsupportedModelError` for models without a decoder stack fed by an encoder's features, and
    `ValueError` for a layer outside 0 to N, or to the first layer whose keys later layers share.
    """
    base = base_model_of(model)
    check_runs(base)
    stack = find_stack(base)
    if not hasattr(stack, ATTRIBUTE):
        check_versions()
        check_supported(base, stack)
    if insert_layer is None:
        insert_layer = (getattr(base.config, CONFIG_KEY, None) or {}).get("insert_layer", 0)
    insertion = getattr(stack, ATTRIBUTE, None) or Insertion(base, stack)
    insertion.check([operator.index(insert_layer)])
    if not hasattr(stack, ATTRIBUTE):
        insertion.install()
    set_insert_layer(base, insert_layer)
    return model


def remove_deep_insert(model: Any) -> Any:
    """Make `model` stock again. Returns it; a model without an insert layer is returned as it is."""
    base = base_model_of(model)
    insertion = getattr(find_stack(base), ATTRIBUTE, None)
    if insertion is not None:
        insertion.uninstall()
    if hasattr(base.config, CONFIG_KEY):
        delattr(base.config, CONFIG_KEY)
    return model


def set_insert_layer(model: Any, insert_layer: int) -> None:
    """Make `insert_layer` the layer in force, and write it to `model.config`."""
    insertion = insertion_of(model)
    layer = operator.index(insert_layer)
    insertion.check([layer])
    insertion.insert_layer = layer
    config = base_model_of(model).config
    setattr(config, CONFIG_KEY, {**(getattr(config, CONFIG_KEY, None) or {}), "insert_layer": layer})


def insert_layer_of(model: Any) -> int:
    """The insert layer in force outside `insert_at`."""
    return insertion_of(model).insert_layer


@contextmanager
def insert_at(
    model: Any, insert_layer: InsertLayer, *, multimodal_mask: Tensor | None = None
) -> Iterator[Any]:
    """Another insert layer for a while, in this thread or task: an int, or a sequence with one layer per row.

    A row that generation repeats (beams, several samples) takes its layer along. `multimodal_mask` (B, S)
    bool says which positions are multimodal where the model cannot know, as with `inputs_embeds` alone.
    """
    insertion = insertion_of(model)
    layers = _layers(insert_layer)
    insertion.check(layers)
    with insertion.overridden(Override(tuple(layers), multimodal_mask)):
        yield model


def _layers(insert_layer: Any) -> list[int]:
    try:
        return [operator.index(insert_layer)]
    except TypeError:
        return [operator.index(layer) for layer in insert_layer]


def insertion_of(model: Any) -> Insertion:
    """What `deep_insert` installed on `model`. Raises `ValueError` where it did not."""
    insertion = getattr(find_stack(model), ATTRIBUTE, None)
    if insertion is None:
        raise ValueError(f"{type(model).__name__} has no insert layer yet: call deep_insert(model) first")
    return insertion
