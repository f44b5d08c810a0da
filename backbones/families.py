"""What differs between model families: where the decoder stack is, and which positions are multimodal.

Generic rules find both on stock `transformers` models; what they cannot do is refused with the reason, so
that no model ever runs silently at insert layer 0.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

PLACEHOLDER_NAMES = tuple(
    f"{kind}_token_{suffix}" for kind in ("image", "video", "audio") for suffix in ("id", "index")
)


_CACHED_PLAINLY = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, DummyLayer)
"""Layers cached in other ways keep blocks, indices or several things of different lengths."""

_CACHED_NOT_AT_ALL = ("moe", "mlp")
"""Types of layers without attention."""


class UnsupportedModelError(ValueError):
    """The model has no decoder stack that multimodal tokens could enter late, or one not handled yet."""


def base_model_of(model: nn.Module) -> PreTrainedModel:
    """The stock model itself, also where PEFT has wrapped it."""
    unwrap: Any = getattr(model, "get_base_model", None)
    inner = model if unwrap is None else unwrap()
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no transformers model; give a PreTrainedModel or a PEFT model of one"
        )
    return inner


def find_stack(model: nn.Module) -> Any:
    """The module that owns the decoder layers of the text model, as `.layers`; of an encoder-decoder, the
    encoder layers.

    Raises `UnsupportedModelError` where there is none or where insertion has no meaning in it.
    """
    model = base_model_of(model)
    name = f"{type(model).__name__} (model type {model.config.model_type!r})"
    if type(model).forward is nn.Module.forward:
        parts = [part for part, module in model.named_children() if hasattr(type(module), "get_decoder")]
        raise UnsupportedModelError(
            f"{name} has no forward of its own; give the part of it that reads images, video or sounds "
            f"(among {', '.join(parts)}): what is set there holds when the whole model calls it"
        )
    stack: Any = _find_encoder(model, name) if is_encoder_decoder(model) else model.get_decoder()
    while not isinstance(getattr(stack, "layers", None), nn.ModuleList):
        inner = [getattr(stack, part, None) for part in ("model", "decoder", "language_model", "text_model")]
        found = [module for module in inner if isinstance(module, nn.Module) and module is not stack]
        if not found:
            raise UnsupportedModelError(
                f"{name}: no list of decoder layers found; insert_layer has no meaning"
            )
        stack = found[0]
    if has_cross_attention(stack):
        raise UnsupportedModelError(
            f"{name} reads images through cross-attention: multimodal tokens are never rows of its decoder"
        )
    for kind in sorted(set(getattr(stack.config, "layer_types", None) or [])):
        if kind not in _CACHED_NOT_AT_ALL and DYNAMIC_LAYER_TYPE_MAPPING.get(kind) not in _CACHED_PLAINLY:
            raise UnsupportedModelError(
                f"{name} has layers of type {kind!r}, which choose or keep their keys in a way of their own; "
                "leaving rows out of them is not handled yet"
            )
    if any(_projects_with_bias(getattr(layer, "conv", None)) for layer in stack.layers):
        raise UnsupportedModelError(
            f"{name} has short convolutions with a bias: padding would not be zero in them, and reach the "
            "rows after it"
        )
    if "inputs_embeds" not in inspect.signature(type(stack).forward).parameters:
        raise UnsupportedModelError(
            f"{name}: its decoder takes no embeddings, so multimodal tokens are never rows of it"
        )
    if any(map(_numbers_its_rows, stack.layers)):
        raise UnsupportedModelError(
            f"{name}: its attention numbers the rows that it is given, so that without the multimodal ones "
            "the others would move together"
        )
    return stack


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


def farthest_position(stack: Any) -> int | None:
    """The end of the prompts that a layer without all rows can be given; None where there is none.

    Llama 4 scales queries by the number of their row, from `floor_scale` rows on.
    """
    config = stack.config
    return config.floor_scale - 1 if getattr(config, "attn_temperature_tuning", False) else None


def deepest_insert_layer(stack: Any) -> int:
    """The number of layers, or the first one whose keys later layers read instead of making their own.

    A later layer that holds all rows could not read keys made without the multimodal ones.
    """
    modes: Any = getattr(stack.config, "kv_sharing_modes", None) or []
    readers = {stack.config.layer_types[index] for index, mode in enumerate(modes) if mode == "reuse"}
    read = [i for i, mode in enumerate(modes) if mode == "store" and stack.config.layer_types[i] in readers]
    return min(read, default=len(stack.layers))


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    configs = (model.config, model.config.get_text_config())
    return any(getattr(config, "is_encoder_decoder", False) for config in configs)


def _find_encoder(model: PreTrainedModel, name: str) -> Any:
    """The encoder of an encoder-decoder, whose output the decoder reads: there the features are rows."""
    encoder: Any = model.get_encoder()
    stack = getattr(encoder, "text_model", encoder)
    layers = getattr(stack, "layers", None)
    if (
        not isinstance(layers, nn.ModuleList)
        or "inputs_embeds" not in inspect.signature(type(stack).forward).parameters
        or "position_bias" in inspect.signature(layers[0].forward).parameters
        or not (find_placeholder_owner(model) or placeholder_token_ids(model.config))
    ):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder: only those are supported whose encoder reads features among "
            "text, in layers that hand no position bias on"
        )
    return stack


def has_cross_attention(stack: nn.Module) -> bool:
    """Whether layers of `stack`, or layers beside them, attend to something that is no row of it."""
    lists = [part for part in stack.children() if isinstance(part, nn.ModuleList)]
    parts = [f"{name} {type(part).__name__}" for layers in lists for name, part in layers.named_modules()]
    return any(re.search("cross_?att|encoder_attn", part, re.IGNORECASE) for part in parts)


def find_placeholder_owner(model: PreTrainedModel) -> Any | None:
    """The module whose `get_placeholder_mask` says where features are scattered; None where there is none."""
    owners = [module for module in model.modules() if hasattr(type(module), "get_placeholder_mask")]
    return owners[0] if owners else None


def placeholder_methods(owner: Any | None) -> list[str]:
    """Names of the methods of `owner` that say where features are scattered; some have another for sounds."""
    names = dir(type(owner))
    return [name for name in names if name.startswith("get_") and name.endswith("placeholder_mask")]


def placeholder_token_ids(config: PreTrainedConfig) -> frozenset[int]:
    """Token ids that stand for multimodal tokens, by the names configurations use for them.

    A model that names none may leave it to its encoders' configurations.
    """
    encoders = [getattr(config, name, None) for name in config.sub_configs if name != "text_config"]
    for parts in ([config], encoders):
        found = (getattr(part, name, None) for part in parts for name in PLACEHOLDER_NAMES)
        tokens = frozenset(token for token in found if isinstance(token, int) and token >= 0)
        if tokens:
            return tokens
    return frozenset()


RECURRENT = frozenset({"linear_attention", "conv"})


def is_recurrent(stack: Any, index: int) -> bool:
    """Whether decoder layer `index` carries a state from row to row (linear attention, short convolution,
    state space) instead of attending to keys."""
    kinds = getattr(stack.config, "layer_types", None) or []
    return index < len(kinds) and kinds[index] in RECURRENT
