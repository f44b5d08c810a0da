"""What differs between model families: where the decoder stack is, and which positions are multimodal.

Generic rules find both on stock `transformers` models; what they cannot do, `refusals.py` refuses.
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

RECURRENT = frozenset({"linear_attention", "conv"})
"""Types of layers that carry a state from row to row instead of attending to keys."""

ENCODER_DECODER = (
    "is an encoder-decoder: only those are supported whose encoder reads features among text, in layers that "
    "hand no position bias on"
)


def base_model_of(model: nn.Module) -> PreTrainedModel:
    """The stock model itself, also where PEFT has wrapped it."""
    unwrap: Any = getattr(model, "get_base_model", None)
    inner = model if unwrap is None else unwrap()
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no transformers model; give a PreTrainedModel or a PEFT model of one"
        )
    return inner


def name_of(model: PreTrainedModel) -> str:
    """What errors call the model."""
    return f"{type(model).__name__} (model type {model.config.model_type!r})"


def find_stack(model: nn.Module) -> Any:
    """The module that owns the decoder layers of the text model, as `.layers`; of an encoder-decoder, the
    encoder layers.

    Raises `UnsupportedModelError` where there is none.
    """
    model = base_model_of(model)
    stack: Any = model.get_encoder() if is_encoder_decoder(model) else model.get_decoder()
    while not isinstance(getattr(stack, "layers", None), nn.ModuleList):
        inner = [getattr(stack, part, None) for part in ("model", "decoder", "language_model", "text_model")]
        found = [module for module in inner if isinstance(module, nn.Module) and module is not stack]
        if not found:
            reason = ": no list of decoder layers found; insert_layer has no meaning"
            if is_encoder_decoder(model):
                reason = f" {ENCODER_DECODER}"
            raise UnsupportedModelError(name_of(model) + reason)
        stack = found[0]
    return stack


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
    return min(layers_read_by_others(stack), default=len(stack.layers))


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    configs = (model.config, model.config.get_text_config())
    return any(getattr(config, "is_encoder_decoder", False) for config in configs)


def find_placeholder_owner(model: PreTrainedModel) -> Any | None:
    """The module whose `get_placeholder_mask` says where features are scattered; None where there is none."""
    owners = [module for module in model.modules() if hasattr(type(module), "get_placeholder_mask")]
    return next(filter(_has_a_placeholder, owners), None)


def _has_a_placeholder(owner: Any) -> bool:
    """Whether the configuration of `owner` has a token that its `get_placeholder_mask` asks for.

    Voxtral Realtime adds its features to the embeddings and has no such token; its class has the method in
    transformers 5.2 to 5.11.
    """
    method = inspect.unwrap(type(owner).get_placeholder_mask)
    names = [name for name in method.__code__.co_names if name.endswith("token_id")]
    return not names or any(hasattr(owner.config, name) for name in names)


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


def is_recurrent(stack: Any, index: int) -> bool:
    """Whether decoder layer `index` carries a state from row to row (linear attention, short convolution)."""
    kinds = getattr(stack.config, "layer_types", None) or []
    return index < len(kinds) and kinds[index] in RECURRENT


def window_of(stack: Any, index: int) -> int | None:
    """How many positions decoder layer `index` sees at most; None where it sees all."""
    kinds = getattr(stack.config, "layer_types", None) or []
    sliding = "sliding" in kinds[index] if index < len(kinds) else True
    return getattr(stack.config, "sliding_window", None) if sliding else None
