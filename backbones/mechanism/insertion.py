"""DeepInsert on an unmodified `transformers` model: below layer L only text rows exist (paper, section 3).

The stock forward computes everything at full length: embeddings, scattered features, positions, masks. Each
decoder layer gets the rows that are alive in it. At layer L the multimodal rows join, as they were when they
entered layer 0; after the last layer, all rows are put back. No weight, module or class name changes, so
`state_dict`, `generate`, Trainer and PEFT see the stock model.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from deepinsert.backbones.families import base_model_of, find_stack
from deepinsert.backbones.refusals import check_runs, check_supported

from .calls import ATTRIBUTE
from .forward_state import Override
from .routing import Insertion
from .self_check import check_versions

CONFIG_KEY = "deepinsert"
"""The attribute of a model's configuration that stores the insert layer."""

InsertLayer = int | Sequence[int]


def deep_insert(model: Any, insert_layer: int | None = None) -> Any:
    """Let multimodal tokens skip the first `insert_layer` decoder layers of `model`, in place.

    If the installed version of transformers or torch was not tested before, the first call runs a self-check
    on a model of a few thousand weights.

    Args:
        model: A stock model, or a PEFT model, which is changed through its base model.
        insert_layer: 0 (the stock model) to N (multimodal tokens never enter). None takes the layer in
            `model.config`, or else 0. The layer is written to `model.config.deepinsert`, so that
            `save_pretrained` keeps it.

    Returns:
        `model`, whose class, parameters and `state_dict` are unchanged.

    Raises:
        UnsupportedModelError: The model has no decoder stack that an encoder's features enter as rows.
        ValueError: The layer is not in 0 to N, or lies behind a layer whose keys later layers share.
        UntriedVersionError: The self-check found wrong numbers.
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
    insertion.limits.check_layers([operator.index(insert_layer)])
    if not hasattr(stack, ATTRIBUTE):
        insertion.install()
    set_insert_layer(base, insert_layer)
    return model


def remove_deep_insert(model: Any) -> Any:
    """Make `model` stock again and return it; a model without an insert layer is returned as it is."""
    base = base_model_of(model)
    insertion = getattr(find_stack(base), ATTRIBUTE, None)
    if insertion is not None:
        insertion.uninstall()
    if hasattr(base.config, CONFIG_KEY):
        delattr(base.config, CONFIG_KEY)
    return model


def set_insert_layer(model: Any, insert_layer: int) -> None:
    """Make `insert_layer` the model's permanent insert layer, and write it to `model.config`.

    Raises `ValueError` for a layer that the model does not have.
    """
    insertion = insertion_of(model)
    layer = operator.index(insert_layer)
    insertion.limits.check_layers([layer])
    insertion.insert_layer = layer
    config = base_model_of(model).config
    setattr(config, CONFIG_KEY, {**(getattr(config, CONFIG_KEY, None) or {}), "insert_layer": layer})


def insert_layer_of(model: Any) -> int:
    """Return the permanent insert layer of the model, which is in force outside `insert_at`."""
    return insertion_of(model).insert_layer


@contextmanager
def insert_at(
    model: Any, insert_layer: InsertLayer, *, multimodal_mask: Tensor | None = None
) -> Iterator[Any]:
    """Use another insert layer inside this block, in the current thread or task only.

    Args:
        model: A model that `deep_insert` was called on. The block gets it as its value.
        insert_layer: One layer, or a sequence with one layer per row. A row that generation repeats (beams,
            several samples) keeps its layer.
        multimodal_mask: (B, S) bool, the multimodal positions, for inputs that do not show them, such as
            `inputs_embeds` alone.

    Raises:
        ValueError: The model does not have such a layer, or has no insert layer yet.
    """
    insertion = insertion_of(model)
    layers = _layer_list(insert_layer)
    insertion.limits.check_layers(layers)
    with insertion.overridden(Override(tuple(layers), multimodal_mask)):
        yield model


def _layer_list(insert_layer: Any) -> list[int]:
    """Return one layer or several as a list; raise `TypeError` for what is no integer."""
    try:
        return [operator.index(insert_layer)]
    except TypeError:
        return [operator.index(layer) for layer in insert_layer]


def insertion_of(model: Any) -> Insertion:
    """Return what `deep_insert` installed on `model`. Raises `ValueError` if it was not called."""
    insertion: Insertion | None = getattr(find_stack(model), ATTRIBUTE, None)
    if insertion is None:
        raise ValueError(f"{type(model).__name__} has no insert layer yet: call deep_insert(model) first")
    return insertion
