"""What changes between versions of `transformers`: caches, the names of arguments, and a few mappings.

Sources are `transformers/cache_utils.py` and the modelling files of 5.0 to 5.24. A version that lacks a class
lacks it here: the constants hold the kinds that there are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Cache, PreTrainedConfig, cache_utils
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""What models and layers call their key-value cache: `cache` from 5.24 on, `past_key_values` before."""

UNREGISTERED: dict[str, Any] = {"_layer_type": None, "layer_type": None}
"""Class attributes of a cache layer's subclass that is not to stand for a type of layers: a class with a
`layer_type` (5.8 to 5.13) or `_layer_type` (since 5.14) becomes the one that new caches are made of."""


def _kinds(*names: str) -> tuple[type, ...]:
    return tuple(getattr(cache_utils, name) for name in names if hasattr(cache_utils, name))


STATEFUL = _kinds("LinearAttentionLayer")
"""Cache layers that carry a state from row to row; since 5.5. Before, such models brought caches of their
own, which are no `Cache`."""

KEYLESS = STATEFUL + _kinds("DummyLayer")
"""Cache layers without keys: a state, or (since 5.23) nothing at all."""

GROWING = _kinds("DynamicLayer", "DynamicSlidingWindowLayer")
QUANTISED = _kinds("QuantoQuantizedLayer", "HQQQuantizedLayer", "Fp8QuantizedLayer")
"""The last one since 5.21."""

INDEXED = _kinds("DynamicIndexedLayer")
"""Growing layers with an indexer's keys beside their own; since 5.11."""

STATIC = _kinds("StaticLayer", "StaticSlidingWindowLayer")
STATIC_COUNTS = isinstance(
    getattr(cache_utils.StaticLayer(max_cache_len=1), "cumulative_length", None), Tensor
)
"""Whether static layers count what they have seen in a tensor, as since 5.4. Before, they count the slots
that are not zero, and are told at each step where to write."""


def cache_in(fields: Mapping[str, Any] | None) -> Any:
    """The key-value cache among arguments by name, or among the fields of an output; None without one.

    It is known by its type, whatever it is called.
    """
    if not isinstance(fields, Mapping):
        return None
    return next((value for value in fields.values() if isinstance(value, Cache)), None)


def cache_name(fields: Mapping[str, Any] | Sequence[str]) -> str:
    """What `fields`, arguments by name or names of parameters, call the key-value cache."""
    if isinstance(fields, Mapping):
        held = [name for name, value in fields.items() if isinstance(value, Cache)]
        if held:
            return held[0]
    return next((name for name in CACHE_ARGUMENTS if name in fields), CACHE_ARGUMENTS[-1])


def foreign_cache(fields: Mapping[str, Any]) -> Any:
    """What is given where a key-value cache belongs and is none of `transformers`' own; None without it."""
    given = (fields.get(name) for name in CACHE_ARGUMENTS)
    return next((value for value in given if value is not None and not isinstance(value, Cache)), None)


_MASK_SIZES_ARE_TOLD_POSITIONS = "cache_position" in inspect.signature(Cache.get_mask_sizes).parameters
"""`get_mask_sizes` takes the number of new positions since 5.4; before, it takes the positions, of which only
the number matters."""


def mask_offset(layer: Any, length: int) -> int:
    """Position of the first key for which the stock mask of `length` new positions has a column."""
    asked = torch.empty(length, dtype=torch.long) if _MASK_SIZES_ARE_TOLD_POSITIONS else length
    return int(layer.get_mask_sizes(asked)[1])


def kept_of_window(layer: Any) -> int | None:
    """How many keys a growing sliding-window layer uses at the next step where it may hold more, as it does
    since 5.14 while it records the past to be cropped; None where it uses all that it holds."""
    return layer.sliding_window - 1 if getattr(layer, "record_past", False) else None


_CROP_TAKES_A_LENGTH = "max_length" in inspect.signature(cache_utils.DynamicLayer.crop).parameters
"""To 5.14 `crop` takes the length to keep, or minus the number of tokens to remove; later the second."""


def tokens_to_remove(asked: int, length: int) -> int:
    """How many tokens `crop(asked)` removes from a layer that has seen `length`."""
    if asked > 0 or (asked == 0 and _CROP_TAKES_A_LENGTH):
        return max(length - asked, 0)
    return -asked


def crop_held(crop: Callable[[int], None], count: int) -> None:
    """Have a stock layer's `crop` drop the last `count` of the keys that it holds. Of none, a layer with a
    window may still drop what it no longer needs, since 5.15; before, that would be a length of 0."""
    if count or not _CROP_TAKES_A_LENGTH:
        crop(-count)


def holds_state(layer: Any) -> bool:
    """Whether a cache layer carries a state from earlier rows. Layers have several states since 5.14."""
    if not isinstance(layer, STATEFUL):
        return False
    started: Any = layer.has_previous_state  # type: ignore[attr-defined]
    return any(started.values()) if isinstance(started, dict) else bool(started)


def join_states(whole: Any, parts: Sequence[Any], order: Tensor) -> None:
    """Give the stateful layer `whole` the states of `parts`, whose rows come in `order` when concatenated.

    All that such a layer holds by row are tensors, in dictionaries since 5.14; the rest is the same in each.
    """
    for name, value in vars(parts[0]).items():
        values = [vars(part)[name] for part in parts]
        if isinstance(value, dict):
            joined: Any = {key: _joined([each[key] for each in values], order) for key in value}
        else:
            joined = _joined(values, order)
        setattr(whole, name, joined)


def _joined(values: Sequence[Any], order: Tensor) -> Any:
    if not isinstance(values[0], Tensor):
        return values[0]
    states = torch.cat(list(values))
    return states[order.to(states.device)]


def cached_as(layer_type: str) -> type | None:
    """The kind of cache layer for decoder layers of a configured type; None where it is not known.

    A mapping since 5.8, under its present name since 5.14.
    """
    for name in ("DYNAMIC_LAYER_TYPE_MAPPING", "LAYER_TYPE_CACHE_MAPPING"):
        if hasattr(cache_utils, name):
            return getattr(cache_utils, name).get(layer_type)
    full, sliding = GROWING
    attention = {"full_attention": full, "sliding_attention": sliding, "chunked_attention": sliding}
    return attention.get(layer_type) or next(
        (kind for kind in STATEFUL if layer_type in ("linear_attention", "conv")), None
    )


def layers_read_by_others(stack: Any) -> list[int]:
    """Indices of the decoder layers whose keys later layers read instead of making their own (Gemma 3n)."""
    modes = sharing_modes(stack)
    kinds: Any = stack.config.layer_types if modes else []
    readers = {kinds[index] for index, mode in enumerate(modes) if mode == "reuse"}
    return [index for index, mode in enumerate(modes) if mode == "store" and kinds[index] in readers]


def sharing_modes(stack: Any) -> Sequence[str | None]:
    """For each decoder layer "reuse" where it reads an earlier layer's keys, "store" where it keeps its own
    for others, else None or another word; empty where no layer shares.

    The configuration says it since 5.23; before, the attention of each layer does.
    """
    modes: Any = getattr(stack.config, "kv_sharing_modes", None) or []
    if modes:
        return modes
    parts = [getattr(layer, "self_attn", None) for layer in stack.layers]
    if not any(getattr(part, "is_kv_shared_layer", False) for part in parts):
        return []
    reading = ["reuse" if getattr(part, "is_kv_shared_layer", False) else None for part in parts]
    storing = ["store" if getattr(part, "store_full_length_kv", False) else None for part in parts]
    return [reads or stores for reads, stores in zip(reading, storing, strict=True)]


def rename_as_published(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a LLaVA as `save_pretrained` names them, under the names of published checkpoints.

    Since 5.6 CLIP towers have lost the level `vision_model`; every version reads the names with it, and those
    before read no others.
    """
    tower = "vision_tower."
    return {
        name.replace(tower, f"{tower}vision_model.") if f"{tower}vision_model." not in name else name: weight
        for name, weight in weights.items()
    }


def attention_of(config: Any) -> str:
    """The attention in use, such as "sdpa". `set_attn_implementation` sets it; nothing public gives it."""
    return str(config._attn_implementation)


def adapter_config(source: str | Path, where: Mapping[str, Any]) -> Path | None:
    """The `adapter_config.json` of a folder or a hub id, downloaded with the arguments `where`; None without
    one."""
    found = find_adapter_config_file(str(source), **where)
    return None if found is None else Path(found)


def file_beside(source: str | Path, name: str, where: Mapping[str, Any]) -> Path | None:
    """The file `name` of a folder or a hub id; None without one. The argument that says so is private."""
    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **where)
    return None if found is None else Path(found)


def processor_without_video(config: PreTrainedConfig) -> Any:
    """The processor class of a configuration's model type without its video half; None where it has none.

    Which parts a class has, `get_attributes` says since 5.0.
    """
    stock: Any = PROCESSOR_MAPPING.get(type(config), None)
    parts = [] if stock is None else list(stock.get_attributes())
    if "video_processor" not in parts:
        return None
    kept = [name for name in parts if name != "video_processor"]
    return type(stock.__name__, (stock,), {"get_attributes": classmethod(lambda cls: kept)})


def pil_image_processor(model_type: str, name: str) -> Any:
    """The image processor class `name` that needs no torchvision: `nameProcessorPil` in a module of its own
    since 5.4, plain `nameProcessor` before."""
    module = f"transformers.models.{model_type}.image_processing_pil_{model_type}"
    if find_spec(module) is not None:
        return getattr(import_module(module), f"{name}ImageProcessorPil")
    return getattr(import_module(module.replace("_pil_", "_")), f"{name}ImageProcessor")


def too_old_for_static_caches() -> str:
    """What an error says of a static cache that cannot skip tokens because of the version."""
    return f"a static cache can from transformers 5.4 on, and this is {transformers.__version__}"
