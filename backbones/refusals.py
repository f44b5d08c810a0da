"""Models in which leaving rows out of a layer would be wrong, or has no meaning: refused with the reason.

The checks look at structure, not at names of models, so that a model nobody has tried is refused as well and
never runs silently at insert layer 0 or with wrong numbers.
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

_CACHED_PLAINLY = (*GROWING, *KEYLESS)
"""Layers cached in other ways keep blocks, indices or several things of different lengths."""

_INDEXER_SIZES = {"index_topk", "index_head_dim", "index_n_heads"}
"""What an indexer that scores single keys is configured by; one with more does something else."""

_CACHED_NOT_AT_ALL = ("moe", "mlp")
"""Types of layers without attention."""


def check_supported(model: PreTrainedModel, stack: Any) -> None:
    """Raise `UnsupportedModelError`, with the reason, where insertion into `stack` would not be exact."""
    reason = _reason(model, stack)
    if reason is not None:
        raise UnsupportedModelError(f"{name_of(model)} {reason}")


def check_runs(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` for a model that only bundles others, and say which part to give."""
    if type(model).forward is nn.Module.forward:
        parts = [part for part, module in model.named_children() if hasattr(type(module), "get_decoder")]
        raise UnsupportedModelError(
            f"{name_of(model)} has no forward of its own; give the part of it that reads images, video or "
            f"sounds (among {', '.join(parts)}): what is set there holds when the whole model calls it"
        )


def check_call(stack: Any, call: dict[str, Any]) -> None:
    """Refuse what a call of `stack` with rows left out would get wrong.

    Router logits: the stock loss that balances experts would give them to the wrong tokens. A cache that is
    none of transformers' own: nothing is known of how its layers keep their keys.
    """
    name = "output_router_logits"
    if call.get(name, getattr(stack.config, name, False)):
        raise ValueError(
            f"{name} needs insert layer 0: below an insert layer some tokens pass no router, which the loss "
            "that balances the experts cannot know; set it to False"
        )
    foreign = foreign_cache(call)
    if foreign is not None:
        raise UnsupportedCacheError(
            f"{type(foreign).__name__} is no cache of transformers' own: use the default DynamicCache, pass "
            "use_cache=False, or insert at layer 0"
        )


def _reason(model: PreTrainedModel, stack: Any) -> str | None:
    arguments = inspect.signature(type(stack).forward).parameters
    placeholders = find_placeholder_owner(model) or placeholder_token_ids(model.config)
    if is_encoder_decoder(model):
        hands_on = "position_bias" in inspect.signature(stack.layers[0].forward).parameters
        if hands_on or not placeholders or "inputs_embeds" not in arguments:
            return ENCODER_DECODER
    elif _has_cross_attention(stack):
        return "reads images through cross-attention: multimodal tokens are never rows of its decoder"
    if any(_projects_with_bias(getattr(layer, "conv", None)) for layer in stack.layers):
        return "has short convolutions with a bias: padding would reach the rows after it"
    if "inputs_embeds" not in arguments:
        return "has a decoder that takes no embeddings: multimodal tokens are never rows of it"
    if any(map(_numbers_its_rows, stack.layers)):
        return (
            "has attention that numbers the rows it is given: without the multimodal ones the others would "
            "move together"
        )
    cached = (*_CACHED_PLAINLY, *INDEXED) if _indexes_single_keys(stack) else _CACHED_PLAINLY
    for kind in sorted(set(getattr(stack.config, "layer_types", None) or [])):
        if kind not in _CACHED_NOT_AT_ALL and cache_class_of(kind) not in cached:
            return (
                f"has layers of type {kind!r}, which choose or keep their keys in a way of their own; "
                "leaving rows out of them is not handled yet"
            )
    if not placeholders and not set(POSITION_ARGUMENTS) & set(arguments):
        return (
            "has no placeholder tokens for images, video or audio that could be found: no row of its decoder "
            "is known to hold a feature"
        )
    return None


def _has_cross_attention(stack: nn.Module) -> bool:
    """Whether layers of `stack`, or layers beside them, attend to something that is no row of it."""
    lists = [part for part in stack.children() if isinstance(part, nn.ModuleList)]
    parts = [f"{name} {type(part).__name__}" for layers in lists for name, part in layers.named_modules()]
    return any(re.search("cross_?att|encoder_attn", part, re.IGNORECASE) for part in parts)


def _indexes_single_keys(stack: Any) -> bool:
    """Whether an indexer scores the keys of its own layer one by one, and neither pools of neighbours, which
    would be others without the multimodal rows, nor for later layers, which may hold other rows."""
    sizes = {name for name in stack.config.to_dict() if name.startswith("index")}
    handed = {name for layer in stack.layers for name in inspect.signature(type(layer).forward).parameters}
    return sizes <= _INDEXER_SIZES and not any("topk" in name for name in handed)


def _projects_with_bias(convolution: Any) -> bool:
    """Whether what a short convolution makes of an all-zero row is something else than zero."""
    projection = getattr(convolution, "in_proj", None)
    return getattr(projection, "bias", None) is not None


def _numbers_its_rows(layer: nn.Module) -> bool:
    """Whether the attention makes positions of its own, which it hands to a part of it (a relative bias)."""
    return any(
        name.endswith("_positions")
        for part in layer.modules()
        for name in inspect.signature(type(part).forward).parameters
    )
