"""Refuses, with the reason, models and calls in which leaving rows out of a layer would be wrong.

The checks look at the structure of a model, not at its name. An unknown model is therefore refused as well,
and never runs silently at insert layer 0 or with wrong numbers.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from deepinsert.backbones.compat.transformers import GROWING, INDEXED, KEYLESS, cache_class_of, foreign_cache
from deepinsert.backbones.mechanism.positions import POSITION_ARGUMENTS

from .errors import UnsupportedCacheError, UnsupportedModelError
from .families import (
    ENCODER_DECODER,
    find_placeholder_owner,
    is_encoder_decoder,
    name_of,
    placeholder_token_ids,
)

_PLAIN_CACHE_CLASSES = (*GROWING, *KEYLESS)
"""Classes of cache layers that store one key per row, or none. Others store blocks, indices or several
tensors of different lengths."""

_INDEXER_SETTINGS = {"index_topk", "index_head_dim", "index_n_heads"}
"""Settings of an indexer that scores single keys. An indexer with more settings does something else."""

_LAYER_TYPES_WITHOUT_ATTENTION = ("moe", "mlp")


def check_supported(model: PreTrainedModel, stack: Any) -> None:
    """Raise `UnsupportedModelError`, with the reason, if insertion into `stack` would not be exact."""
    arguments = list(inspect.signature(type(stack).forward).parameters)
    reason = _reason_of_structure(model, stack, arguments) or _reason_of_rows(model, stack, arguments)
    if reason is not None:
        raise UnsupportedModelError(f"{name_of(model)} {reason}")


def check_runs(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` for a model that only bundles others, and name the parts to give."""
    if type(model).forward is nn.Module.forward:
        parts = [part for part, module in model.named_children() if hasattr(type(module), "get_decoder")]
        raise UnsupportedModelError(
            f"{name_of(model)} has no forward of its own: give its part that reads images, video or "
            f"sounds ({' or '.join(parts)}); an insert layer set there also holds when the whole model calls "
            "the part"
        )


def check_call(stack: Any, call: dict[str, Any]) -> None:
    """Check the arguments of a call of `stack` in which rows are left out.

    Raises `ValueError` for router logits: the stock loss that balances experts would assign them to the
    wrong tokens. Raises `UnsupportedCacheError` for a cache that is not a class of transformers: it is
    unknown how its layers store their keys.
    """
    name = "output_router_logits"
    if call.get(name, getattr(stack.config, name, False)):
        raise ValueError(
            f"{name} needs insert layer 0: below an insert layer some tokens pass through no router, and the "
            f"loss that balances the experts does not know which; set {name} to False"
        )
    cache = foreign_cache(call)
    if cache is not None:
        raise UnsupportedCacheError(
            f"{type(cache).__name__} is not a cache of transformers: use the default DynamicCache, pass "
            "use_cache=False, or insert at layer 0"
        )


def _reason_of_structure(model: PreTrainedModel, stack: Any, arguments: list[str]) -> str | None:
    """Return why multimodal tokens are no rows of the stack's layers, as the end of a sentence, or None.

    `arguments` names the arguments of the stack's forward.
    """
    takes_embeddings = "inputs_embeds" in arguments
    if is_encoder_decoder(model):
        passes_bias = "position_bias" in inspect.signature(stack.layers[0].forward).parameters
        if passes_bias or not _has_placeholders(model) or not takes_embeddings:
            return ENCODER_DECODER
    elif _has_cross_attention(stack):
        return "reads images through cross-attention: multimodal tokens are never rows of its decoder"
    if any(_projects_with_bias(getattr(layer, "conv", None)) for layer in stack.layers):
        return "has short convolutions with a bias, through which padding would change the rows after it"
    if not takes_embeddings:
        return "has a decoder that takes no embeddings, so multimodal tokens are never rows of it"
    return None


def _reason_of_rows(model: PreTrainedModel, stack: Any, arguments: list[str]) -> str | None:
    """Return why rows cannot be left out of the stack's layers, as the end of a sentence, or None."""
    if any(map(_numbers_its_rows, stack.layers)):
        return (
            "has attention that numbers the rows it gets: without the multimodal rows, the others would move "
            "closer together"
        )
    supported = (*_PLAIN_CACHE_CLASSES, *INDEXED) if _indexes_single_keys(stack) else _PLAIN_CACHE_CLASSES
    for layer_type in sorted(set(getattr(stack.config, "layer_types", None) or [])):
        if layer_type not in _LAYER_TYPES_WITHOUT_ATTENTION and cache_class_of(layer_type) not in supported:
            return (
                f"has layers of type {layer_type!r}, which choose or keep their keys in a way of their own; "
                "leaving rows out of them is not supported yet"
            )
    if not _has_placeholders(model) and not set(POSITION_ARGUMENTS) & set(arguments):
        return (
            "has no placeholder tokens for images, video or audio that could be found, so it is unknown "
            "which rows of its decoder hold features"
        )
    return None


def _has_placeholders(model: PreTrainedModel) -> bool:
    """Whether the model tells, by a method or by token ids, where it scatters features."""
    return find_placeholder_owner(model) is not None or bool(placeholder_token_ids(model.config))


def _has_cross_attention(stack: nn.Module) -> bool:
    """Whether layers of `stack`, or layers beside them, attend to something that is no row of it."""
    lists = [part for part in stack.children() if isinstance(part, nn.ModuleList)]
    parts = [f"{name} {type(part).__name__}" for layers in lists for name, part in layers.named_modules()]
    return any(re.search("cross_?att|encoder_attn", part, re.IGNORECASE) for part in parts)


def _indexes_single_keys(stack: Any) -> bool:
    """Whether each layer's indexer scores the keys of this layer one by one.

    Pools of neighbouring keys would change without the multimodal rows. Scores that a layer passes to later
    layers would not fit these if they hold other rows.
    """
    settings = {name for name in stack.config.to_dict() if name.startswith("index")}
    arguments = {name for layer in stack.layers for name in inspect.signature(type(layer).forward).parameters}
    return settings <= _INDEXER_SETTINGS and not any("topk" in name for name in arguments)


def _projects_with_bias(convolution: Any) -> bool:
    """Whether a short convolution turns an all-zero row into something else than zero."""
    projection = getattr(convolution, "in_proj", None)
    return getattr(projection, "bias", None) is not None


def _numbers_its_rows(layer: nn.Module) -> bool:
    """Whether the attention makes positions itself and passes them to a part of it (a relative bias)."""
    return any(
        name.endswith("_positions")
        for part in layer.modules()
        for name in inspect.signature(type(part).forward).parameters
    )
