"""One call of the decoder stack for each insert layer of a batch.

With one insert layer per row, the row that goes least deep would set how many rows every layer computes. The
prefill is therefore divided: rows of one insert layer are called together, and the caches they leave are
joined to one, left-padded, in the order of the batch. Decoding then runs the whole batch at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache

from deepinsert.backbones.compat.transformers import (
    CACHE_ARGUMENTS,
    GROWING,
    KEYLESS,
    STATEFUL,
    cache_in,
    cache_name,
    join_states,
)

from .cache import KeyMap, become_short, is_empty, is_short, stored_keys

_BATCH_DIMENSION = {
    "input_ids": 0,
    "inputs_embeds": 0,
    "attention_mask": 0,
    "position_ids": -2,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "moe_mm_token_type_ids": 0,
    "visual_pos_masks": 0,
    "per_layer_inputs": 0,
}
"""Where the batch is in what a model hands its stack."""

_SHARED = frozenset({*CACHE_ARGUMENTS, "cache_position"})
"""What all groups are given as it is; the cache, a copy each."""

_RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")

Run = Callable[[Sequence[int], Tensor, dict[str, Any]], Any]


def can_group(stack: Any, layers: Sequence[int], call: dict[str, Any]) -> bool:
    """Whether a call of `stack` can be divided by rows: several insert layers, an empty cache or none,
    nothing recorded on the way, and no argument whose rows are unknown."""
    past, mask = cache_in(call), call.get("attention_mask")
    masks = mask.values() if isinstance(mask, dict) else [mask]
    if any(isinstance(each, BlockMask) for each in masks):
        return False
    if len(set(layers)) == 1 or any(call.get(name, getattr(stack.config, name, False)) for name in _RECORDED):
        return False
    if past is not None and not (is_empty(past) and _can_join(past)):
        return False
    if call.get("return_dict") is False:
        return False
    return all(
        name in _BATCH_DIMENSION or name in _SHARED or name == "deepstack_visual_embeds"
        for name, value in call.items()
        if _holds_tensor(value)
    )


def _can_join(cache: Cache) -> bool:
    kinds: set[Any] = {type(layer) for layer in cache.layers} | {cache.layer_class_to_replicate}
    return not cache.offloading and kinds <= {*GROWING, *KEYLESS, None}


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    return isinstance(value, Tensor | Cache) or (
        isinstance(value, list | tuple) and any(map(_holds_tensor, value))
    )


def in_groups(run: Run, layers: Sequence[int], multimodal: Tensor, call: dict[str, Any]) -> Any:
    """`run(layers, multimodal, call)` for each distinct layer of `layers` (B,), and what the stack returns,
    with all rows in their order."""
    groups = [[row for row, own in enumerate(layers) if own == layer] for layer in sorted(set(layers))]
    cache = cache_in(call)
    places = [torch.tensor(rows, device=multimodal.device) for rows in groups]
    outputs = []
    caches: list[Any] = []
    for rows, index in zip(groups, places, strict=True):
        own = {name: _rows_of(name, value, index, len(layers), call) for name, value in call.items()}
        if cache is not None:
            own[cache_name(call)] = copy.deepcopy(cache)
        outputs.append(run([layers[rows[0]]] * len(rows), multimodal[index], own))
        caches.append(cache_in(outputs[-1]) if cache is None else cache_in(own))
    order = torch.argsort(torch.cat(places))
    whole = outputs[0]
    states = torch.cat([output.last_hidden_state for output in outputs])
    whole.last_hidden_state = states[order.to(states.device)]
    if caches[0] is not None:
        joined = join_caches(caches[0] if cache is None else cache, caches, places)
        if cache_in(whole) is not None:
            setattr(whole, cache_name(whole), joined)
    return whole


def _rows_of(name: str, value: Any, rows: Tensor, batch: int, call: dict[str, Any]) -> Any:
    """The rows of one argument of the stack; a batch dimension of size 1 serves every row."""
    if name == "deepstack_visual_embeds" and value is not None:
        counts = call["visual_pos_masks"].sum(dim=-1)
        owner = torch.repeat_interleave(torch.arange(batch, device=rows.device), counts.to(rows.device))
        own = torch.isin(owner, rows)
        return [features[own.to(features.device)] for features in value]
    if name not in _BATCH_DIMENSION or value is None:
        return value
    if isinstance(value, dict):
        return {kind: _rows_of(name, mask, rows, batch, call) for kind, mask in value.items()}
    dim = _BATCH_DIMENSION[name]
    return value if value.shape[dim] == 1 else value.index_select(dim, rows.to(value.device))


def join_caches(cache: Cache, caches: Sequence[Cache], rows: Sequence[Tensor]) -> Cache:
    """The caches of groups of rows as one, in `cache`; `rows` says which rows of the batch each holds."""
    while len(cache.layers) < len(caches[0].layers):
        cache.layers.append(copy.copy(caches[0].layers[len(cache.layers)]))
    maps: dict[tuple, KeyMap] = {}
    for index, layer in enumerate(cache.layers):
        parts: list[Any] = [part.layers[index] for part in caches]
        if isinstance(layer, STATEFUL):
            join_states(layer, parts, torch.argsort(torch.cat(list(rows))))
        elif not isinstance(layer, KEYLESS) and parts[0].is_initialized:
            _join_keys(layer, parts, rows, maps)
    return cache


def _join_keys(layer: Any, parts: Sequence[Any], rows: Sequence[Tensor], maps: dict[tuple, KeyMap]) -> None:
    """Keys and values of all parts, the shorter ones padded with dummies on the left."""
    most = max(part.keys.shape[-2] for part in parts)
    total = parts[0].get_seq_length()
    keys = _left_padded([part.keys for part in parts], rows, most, 0)
    values = _left_padded([part.values for part in parts], rows, most, 0)
    keymap = None
    if any(is_short(part) for part in parts):
        key = (most, total, *(id(getattr(part, "keymap", None)) for part in parts))
        if key not in maps:
            held = [_held(part)[:, None, :, None] for part in parts]
            columns = _left_padded(held, rows, most, -1)[:, 0, :, 0]
            maps[key] = KeyMap(columns, total - most, bool((columns < 0).any()))
        keymap = maps[key]
    # `layer` may be one of the parts: nothing is changed before all is read.
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if keymap is not None:
        become_short(layer, keymap, total)
    elif hasattr(layer, "cumulative_length"):
        layer.cumulative_length = total


def _held(part: Any) -> Tensor:
    """(B, K) positions of the keys that a group's layer holds."""
    count, batch = part.keys.shape[-2], part.keys.shape[0]
    if is_short(part):
        positions = part.keymap.positions(stored_keys(part))
    else:
        positions = torch.arange(part.get_seq_length(), device=part.keys.device).expand(batch, -1)
    return positions[:, positions.shape[1] - count :]


def _left_padded(parts: Sequence[Tensor], rows: Sequence[Tensor], most: int, padding: int) -> Tensor:
    """(B, H, `most`, D): each part (b, H, k, D) at its rows of the batch, `padding` on its left."""
    size = sum(part.shape[0] for part in parts), parts[0].shape[1], most, parts[0].shape[3]
    whole = parts[0].new_empty(size)
    for part, own in zip(parts, rows, strict=True):
        missing = most - part.shape[2]
        own = own.to(part.device)
        whole[own, :, :missing] = padding
        whole[own, :, missing:] = part
    return whole
