"""Parts of `transformers` that change between versions: caches, names of arguments, and a few mappings.

Sources are `transformers/cache_utils.py` and the modelling files of 5.0 to 5.24. The constants below hold
only the classes that the installed version has.
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
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""Names of the key-value cache in models and layers: `cache` since 5.24, `past_key_values` before."""

UNREGISTERED: dict[str, Any] = {"_layer_type": None, "layer_type": None}
"""Class attributes that keep a subclass of a cache layer out of new caches.

A class with a `layer_type` (5.8 to 5.13) or `_layer_type` (since 5.14) becomes the class that new caches use
for that type of layers."""


def _layer_classes(*names: str) -> tuple[type, ...]:
    """Return the classes of cache layers with these names that the installed version has."""
    return tuple(getattr(cache_utils, name) for name in names if hasattr(cache_utils, name))


STATEFUL = _layer_classes("LinearAttentionLayer")
"""Cache layers that carry a state from row to row; since 5.5. Before, such models had caches of their own,
which are no `Cache`."""

KEYLESS = STATEFUL + _layer_classes("DummyLayer")
"""Cache layers without keys: with a state, or (since 5.23) with nothing at all."""

GROWING = _layer_classes("DynamicLayer", "DynamicSlidingWindowLayer")
"""Cache layers that grow with each token, or until their sliding window is full."""

QUANTISED = _layer_classes("QuantoQuantizedLayer", "HQQQuantizedLayer", "Fp8QuantizedLayer")
"""Growing layers with quantised keys and values; the last one exists since 5.21."""

INDEXED = _layer_classes("DynamicIndexedLayer")
"""Growing layers with an indexer's keys beside their own; since 5.11."""

STATIC = _layer_classes("StaticLayer", "StaticSlidingWindowLayer")
"""Cache layers of a fixed size."""

STATIC_COUNTS = isinstance(
    getattr(cache_utils.StaticLayer(max_cache_len=1), "cumulative_length", None), Tensor
)
"""Whether static layers count their tokens in a tensor, as they do since 5.4. Before, they count the slots
that are not zero, and each step passes the positions to write to."""


def cache_in(fields: Mapping[str, Any] | None) -> Any:
    """Return the key-value cache among arguments by name, or among the fields of an output; None without one.

    It is recognised by its type, whatever its name.
    """
    if not isinstance(fields, Mapping):
        return None
    return next((value for value in fields.values() if isinstance(value, Cache)), None)


def cache_name(fields: Mapping[str, Any] | Sequence[str]) -> str:
    """Return the name of the key-value cache in `fields`: arguments by name, or names of parameters."""
    if isinstance(fields, Mapping):
        names = [name for name, value in fields.items() if isinstance(value, Cache)]
        if names:
            return names[0]
    return next((name for name in CACHE_ARGUMENTS if name in fields), CACHE_ARGUMENTS[-1])


def foreign_cache(fields: Mapping[str, Any]) -> Any:
    """Return the argument in the cache's place that is no `Cache` of `transformers`; None without one."""
    values = (fields.get(name) for name in CACHE_ARGUMENTS)
    return next((value for value in values if value is not None and not isinstance(value, Cache)), None)


_MASK_SIZES_TAKE_POSITIONS = "cache_position" in inspect.signature(Cache.get_mask_sizes).parameters
"""`get_mask_sizes` takes the number of new positions since 5.4; before, it takes the positions, of which only
the number matters."""


def mask_offset(layer: Any, length: int) -> int:
    """Return the position of the first key that has a column in the stock mask of `length` new positions."""
    argument = torch.empty(length, dtype=torch.long) if _MASK_SIZES_TAKE_POSITIONS else length
    return int(layer.get_mask_sizes(argument)[1])


def usable_window_keys(layer: Any) -> int | None:
    """Return how many keys a growing sliding-window layer uses at the next step; None if it uses all.

    It may hold more since 5.14, while it records the past so that it can be cropped.
    """
    return layer.sliding_window - 1 if getattr(layer, "record_past", False) else None


_CROP_TAKES_A_LENGTH = "max_length" in inspect.signature(cache_utils.DynamicLayer.crop).parameters
"""Whether `crop` takes the length to keep, or minus the number of tokens to remove, as up to 5.14; later
versions take only the second."""


def tokens_to_remove(argument: int, length: int) -> int:
    """Return how many tokens `crop(argument)` removes from a layer that has cached `length` tokens so far."""
    if argument > 0 or (argument == 0 and _CROP_TAKES_A_LENGTH):
        return max(length - argument, 0)
    return -argument


def crop_last_keys(crop: Callable[[int], None], count: int) -> None:
    """Call a stock layer's `crop` so that it drops the last `count` of the keys that it holds.

    With a count of 0, a layer with a window may still drop what it no longer needs, since 5.15; before, 0
    would be a length.
    """
    if count or not _CROP_TAKES_A_LENGTH:
        crop(-count)


def holds_state(layer: Any) -> bool:
    """Whether a cache layer carries a state from earlier rows. Layers have several states since 5.14."""
    if not isinstance(layer, STATEFUL):
        return False
    flags: Any = getattr(layer, "has_previous_state")  # noqa: B009 - the classes in STATEFUL are not typed
    return any(flags.values()) if isinstance(flags, dict) else bool(flags)


def join_states(whole: Any, parts: Sequence[Any], order: Tensor) -> None:
    """Give the stateful layer `whole` the states of `parts`, whose rows come in `order` when concatenated.

    All that such a layer holds per row are tensors, in dictionaries since 5.14; the rest is equal in all.
    """
    for name, value in vars(parts[0]).items():
        values = [vars(part)[name] for part in parts]
        if isinstance(value, dict):
            states: Any = {key: _join_rows([each[key] for each in values], order) for key in value}
        else:
            states = _join_rows(values, order)
        setattr(whole, name, states)


def _join_rows(values: Sequence[Any], order: Tensor) -> Any:
    """Concatenate tensors and put their rows in order; return the first of any other values."""
    if not isinstance(values[0], Tensor):
        return values[0]
    states = torch.cat(list(values))
    return states[order.to(states.device)]


def cache_class_of(layer_type: str) -> type | None:
    """Return the class of cache layer for decoder layers of a configured type; None for an unknown type.

    `transformers` has a mapping since 5.8, under its present name since 5.14.
    """
    for name in ("DYNAMIC_LAYER_TYPE_MAPPING", "LAYER_TYPE_CACHE_MAPPING"):
        if hasattr(cache_utils, name):
            mapping: Mapping[str, type] = getattr(cache_utils, name)
            return mapping.get(layer_type)
    full, sliding = GROWING
    attention = {"full_attention": full, "sliding_attention": sliding, "chunked_attention": sliding}
    return attention.get(layer_type) or next(
        (kind for kind in STATEFUL if layer_type in ("linear_attention", "conv")), None
    )


def layers_read_by_others(stack: Any) -> list[int]:
    """Return the indices of the decoder layers whose keys later layers read (Gemma 3n)."""
    modes = sharing_modes(stack)
    kinds: Any = stack.config.layer_types if modes else []
    readers = {kinds[index] for index, mode in enumerate(modes) if mode == "reuse"}
    return [index for index, mode in enumerate(modes) if mode == "store" and kinds[index] in readers]


def sharing_modes(stack: Any) -> Sequence[str | None]:
    """Return how each decoder layer shares keys (N,); empty if no layer does.

    A layer has "reuse" if it reads an earlier layer's keys, "store" if it keeps its own for later layers,
    else None or another word. The configuration holds this since 5.23; before, each layer's attention does.
    """
    modes: Sequence[str | None] = getattr(stack.config, "kv_sharing_modes", None) or []
    if modes:
        return modes
    attentions = [getattr(layer, "self_attn", None) for layer in stack.layers]
    if not any(getattr(attention, "is_kv_shared_layer", False) for attention in attentions):
        return []
    reading = ["reuse" if getattr(part, "is_kv_shared_layer", False) else None for part in attentions]
    storing = ["store" if getattr(part, "store_full_length_kv", False) else None for part in attentions]
    return [reads or stores for reads, stores in zip(reading, storing, strict=True)]


def rename_as_published(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a LLaVA's weights from the names of `save_pretrained` to those of published checkpoints.

    Since 5.6, the names of CLIP towers lack the level `vision_model`. Every version reads the names with it;
    versions before 5.6 read no others.
    """
    tower = "vision_tower."
    return {
        name.replace(tower, f"{tower}vision_model.") if f"{tower}vision_model." not in name else name: weight
        for name, weight in weights.items()
    }


def attention_of(config: Any) -> str:
    """Return the attention in use, such as "sdpa".

    `set_attn_implementation` sets it; nothing public returns it.
    """
    return str(config._attn_implementation)


def adapter_config(source: str | Path, location: Mapping[str, Any]) -> Path | None:
    """Return the `adapter_config.json` of a folder or a hub id; None without one.

    `location` holds the arguments of the download, such as `revision`, here and below.
    """
    path = find_adapter_config_file(str(source), **location)
    return None if path is None else Path(path)


def file_beside(source: str | Path, name: str, location: Mapping[str, Any]) -> Path | None:
    """Return the file `name` of a folder or a hub id; None without one.

    The argument that returns None instead of raising is private.
    """
    path = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **location)
    return None if path is None else Path(path)


def processor_without_video(config: PreTrainedConfig) -> Any:
    """Return the processor class of a model type without its video part; None if it has no such part.

    `get_attributes` returns the parts of a class since 5.0.
    """
    stock: Any = PROCESSOR_MAPPING.get(type(config), None)
    parts = [] if stock is None else list(stock.get_attributes())
    if "video_processor" not in parts:
        return None
    other_parts = [name for name in parts if name != "video_processor"]
    return type(stock.__name__, (stock,), {"get_attributes": classmethod(lambda cls: other_parts)})


def pil_image_processor(model_type: str, name: str) -> Any:
    """Return the image processor class of a model that needs no torchvision, such as `CLIP` for "clip".

    It is `{name}ImageProcessorPil` in a module of its own since 5.4, and plain `{name}ImageProcessor` before.
    """
    module = f"transformers.models.{model_type}.image_processing_pil_{model_type}"
    if find_spec(module) is not None:
        return getattr(import_module(module), f"{name}ImageProcessorPil")
    return getattr(import_module(module.replace("_pil_", "_")), f"{name}ImageProcessor")


def too_old_for_static_caches() -> str:
    """Return the end of an error message: why a static cache cannot skip tokens under this version."""
    return f"a static cache can from transformers 5.4 on, and this is {transformers.__version__}"
