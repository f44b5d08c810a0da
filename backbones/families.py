"""What differs between model families: where the decoder stack is, and which token ids are placeholders.

The rules are generic and find both on stock `transformers` models. `refusals.py` refuses models for which
they are not enough.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from deepinsert.backbones.compat.transformers import layers_read_by_others

from .errors import UnsupportedModelError

PLACEHOLDER_NAMES = tuple(
    f"{kind}_token_{suffix}" for kind in ("image", "video", "audio") for suffix in ("id", "index")
)
"""Names under which configurations store the token ids that stand for multimodal tokens."""

RECURRENT_LAYER_TYPES = frozenset({"linear_attention", "conv"})
"""Types of layers that carry a state from row to row instead of attending to keys."""

ENCODER_DECODER = (
    "is an encoder-decoder: supported are only those whose encoder reads features among text and whose "
    "layers pass on no position bias"
)
"""Why most encoder-decoders are refused, as the end of a sentence about the model."""


def base_model_of(model: nn.Module) -> PreTrainedModel:
    """Return the stock model itself, also if PEFT has wrapped it.

    Raises `UnsupportedModelError` if there is no `PreTrainedModel` inside.
    """
    unwrap: Any = getattr(model, "get_base_model", None)
    base = model if unwrap is None else unwrap()
    if not isinstance(base, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model: give a PreTrainedModel, or a PEFT model "
            "that wraps one"
        )
    return base


def name_of(model: PreTrainedModel) -> str:
    """Return the name by which errors call the model: its class and its model type."""
    return f"{type(model).__name__} (model type {model.config.model_type!r})"


def find_stack(model: nn.Module) -> Any:
    """Return the module that owns the text model's decoder layers, as its attribute `layers`.

    In an encoder-decoder these are the encoder layers. Raises `UnsupportedModelError` if there is no such
    module.
    """
    base: Any = base_model_of(model)
    stack = base.get_encoder() if is_encoder_decoder(base) else base.get_decoder()
    while not isinstance(getattr(stack, "layers", None), nn.ModuleList):
        parts = [getattr(stack, name, None) for name in ("model", "decoder", "language_model", "text_model")]
        inner_modules = [part for part in parts if isinstance(part, nn.Module) and part is not stack]
        if not inner_modules:
            reason = ": no list of decoder layers was found, so there is no layer to insert at"
            if is_encoder_decoder(base):
                reason = f" {ENCODER_DECODER}"
            raise UnsupportedModelError(name_of(base) + reason)
        stack = inner_modules[0]
    return stack


def farthest_position(stack: Any) -> int | None:
    """Return the longest prompt, in positions, for which layers may lack rows; None if there is no limit.

    Llama 4 scales queries by their row number, from row `floor_scale` on.
    """
    config = stack.config
    return config.floor_scale - 1 if getattr(config, "attn_temperature_tuning", False) else None


def deepest_insert_layer(stack: Any) -> int:
    """Return the deepest insert layer: the number of layers N, or the first layer whose keys others read.

    Some models reuse the keys of a layer in later layers. A later layer that holds all rows could not read
    keys that were made without the multimodal rows.
    """
    return min(layers_read_by_others(stack), default=len(stack.layers))


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    """Whether the model, or its text model, is an encoder-decoder."""
    configs = (model.config, model.config.get_text_config())
    return any(getattr(config, "is_encoder_decoder", False) for config in configs)


def find_placeholder_owner(model: PreTrainedModel) -> Any | None:
    """Return the module whose `get_placeholder_mask` locates scattered features; None if there is none."""
    owners = [module for module in model.modules() if hasattr(type(module), "get_placeholder_mask")]
    return next(filter(_has_placeholder, owners), None)


def _has_placeholder(owner: Any) -> bool:
    """Whether the configuration of `owner` has a token id that its `get_placeholder_mask` reads.

    Voxtral Realtime adds its features to the embeddings and has no such token; its class has the method in
    transformers 5.2 to 5.11.
    """
    method = inspect.unwrap(type(owner).get_placeholder_mask)
    names = [name for name in method.__code__.co_names if name.endswith("token_id")]
    return not names or any(hasattr(owner.config, name) for name in names)


def placeholder_methods(owner: Any | None) -> list[str]:
    """Return the names of the methods of `owner` that locate scattered features.

    Some models have a second method for sounds.
    """
    names = dir(type(owner))
    return [name for name in names if name.startswith("get_") and name.endswith("placeholder_mask")]


def placeholder_token_ids(config: PreTrainedConfig) -> frozenset[int]:
    """Return the token ids that stand for multimodal tokens, under the names that configurations use.

    If the model's own configuration names none, those of its encoders are read.
    """
    encoders = [getattr(config, name, None) for name in config.sub_configs if name != "text_config"]
    for parts in ([config], encoders):
        values = (getattr(part, name, None) for part in parts for name in PLACEHOLDER_NAMES)
        token_ids = frozenset(value for value in values if isinstance(value, int) and value >= 0)
        if token_ids:
            return token_ids
    return frozenset()


def is_recurrent(stack: Any, index: int) -> bool:
    """Whether decoder layer `index` carries a state from row to row (linear attention, short convolution)."""
    types = getattr(stack.config, "layer_types", None) or []
    return index < len(types) and types[index] in RECURRENT_LAYER_TYPES


def window_of(stack: Any, index: int) -> int | None:
    """Return the sliding window of decoder layer `index`, in positions; None if it sees all positions."""
    types = getattr(stack.config, "layer_types", None) or []
    is_sliding = "sliding" in types[index] if index < len(types) else True
    window: int | None = getattr(stack.config, "sliding_window", None) if is_sliding else None
    return window
