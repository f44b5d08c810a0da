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

PLACEHOLDER_NAMES = tuple(
    f"{kind}_token_{suffix}" for kind in ("image", "video", "audio") for suffix in ("id", "index")
)


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
    return stack


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


RECURRENT = frozenset({"linear_attention", "conv", "mamba", "recurrent"})


def is_recurrent(stack: Any, index: int) -> bool:
    """Whether decoder layer `index` carries a state from row to row (linear attention, short convolution,
    state space) instead of attending to keys."""
    kinds = getattr(stack.config, "layer_types", None) or []
    return index < len(kinds) and kinds[index] in RECURRENT
