"""Calls the decoder stack once per distinct insert layer of a batch.

With one insert layer per row, the row with the smallest layer would decide how many rows every layer
computes. The prefill is therefore divided: rows with the same insert layer run together, and their caches are
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
"""The dimension of the batch in the arguments that a model passes to its stack."""

_SHARED = frozenset({*CACHE_ARGUMENTS, "cache_position"})
"""Arguments that all groups get as they are; each group gets a copy of the cache."""

_RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")

RunGroup = Callable[[Sequence[int], Tensor, dict[str, Any]], Any]
"""Calls the stack for some rows: with their insert layers, their multimodal positions and their arguments."""


def can_group(stack: Any, layers: Sequence[int], call: dict[str, Any]) -> bool:
    """Whether a call of `stack` can be divided by rows.

    This needs several insert layers in `layers`, an empty cache or none, no recorded states, and arguments in
    `call` whose rows are known.
    """
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
    """Whether all layers of the cache are growing ones, or hold no keys."""
    classes: set[Any] = {type(layer) for layer in cache.layers} | {cache.layer_class_to_replicate}
    return not cache.offloading and classes <= {*GROWING, *KEYLESS, None}


def _holds_tensor(value: Any) -> bool:
    """Whether an argument of a stack is, or holds, a tensor or a cache."""
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    return isinstance(value, Tensor | Cache) or (
        isinstance(value, list | tuple) and any(map(_holds_tensor, value))
    )


def run_in_groups(
    run_group: RunGroup, layers: Sequence[int], multimodal: Tensor, call: dict[str, Any]
) -> Any:
    """Run the rows of each distinct insert layer together.

    Args:
        run_group: Calls the stack for a group of rows.
        layers: The insert layer of each of the B rows.
        multimodal: (B, S) bool, the multimodal positions.
        call: The stack's arguments by name, for all rows.

    Returns:
        What the stack returns, with all rows in the order of the batch.
    """
    groups = [
        [row for row, row_layer in enumerate(layers) if row_layer == layer] for layer in sorted(set(layers))
    ]
    cache = cache_in(call)
    indices = [torch.tensor(rows, device=multimodal.device) for rows in groups]
    outputs = []
    caches: list[Any] = []
    for rows, index in zip(groups, indices, strict=True):
        group_call = {name: _select(name, value, index, len(layers), call) for name, value in call.items()}
        if cache is not None:
            group_call[cache_name(call)] = copy.deepcopy(cache)
        outputs.append(run_group([layers[rows[0]]] * len(rows), multimodal[index], group_call))
        caches.append(cache_in(outputs[-1]) if cache is None else cache_in(group_call))
    order = torch.argsort(torch.cat(indices))
    whole = outputs[0]
    states = torch.cat([output.last_hidden_state for output in outputs])
    whole.last_hidden_state = states[order.to(states.device)]
    if caches[0] is not None:
        joined = join_caches(caches[0] if cache is None else cache, caches, indices)
        if cache_in(whole) is not None:
            setattr(whole, cache_name(whole), joined)
    return whole


def _select(name: str, value: Any, rows: Tensor, batch: int, call: dict[str, Any]) -> Any:
    """Return some rows of one argument of the stack.

    Args:
        name: The name of the argument.
        value: The argument for all rows. A batch dimension of size 1 serves every row.
        rows: The rows to select.
        batch: The number B of all rows.
        call: All arguments of the stack by name.
    """
    if name == "deepstack_visual_embeds" and value is not None:
        counts = call["visual_pos_masks"].sum(dim=-1)
        owner = torch.repeat_interleave(torch.arange(batch, device=rows.device), counts.to(rows.device))
        is_selected = torch.isin(owner, rows)
        return [features[is_selected.to(features.device)] for features in value]
    if name not in _BATCH_DIMENSION or value is None:
        return value
    if isinstance(value, dict):
        return {kind: _select(name, mask, rows, batch, call) for kind, mask in value.items()}
    dim = _BATCH_DIMENSION[name]
    return value if value.shape[dim] == 1 else value.index_select(dim, rows.to(value.device))


def join_caches(cache: Cache, caches: Sequence[Cache], rows: Sequence[Tensor]) -> Cache:
    """Join the caches of groups of rows in `cache`; `rows` says which rows of the batch each group holds."""
    while len(cache.layers) < len(caches[0].layers):
        cache.layers.append(copy.copy(caches[0].layers[len(cache.layers)]))
    keymaps: dict[tuple[int, ...], KeyMap] = {}
    for index, layer in enumerate(cache.layers):
        parts: list[Any] = [part.layers[index] for part in caches]
        if isinstance(layer, STATEFUL):
            join_states(layer, parts, torch.argsort(torch.cat(list(rows))))
        elif not isinstance(layer, KEYLESS) and parts[0].is_initialized:
            _join_keys(layer, parts, rows, keymaps)
    return cache


def _join_keys(
    layer: Any, parts: Sequence[Any], rows: Sequence[Tensor], keymaps: dict[tuple[int, ...], KeyMap]
) -> None:
    """Join the keys and values of all groups in `layer`, padded on the left with dummies.

    Args:
        layer: The cache layer of the whole batch; it may be one of the parts.
        parts: The cache layer of each group.
        rows: Which rows of the batch each group holds.
        keymaps: The key maps made so far, which layers share if their parts share theirs.
    """
    longest = max(part.keys.shape[-2] for part in parts)
    total = parts[0].get_seq_length()
    keys = _left_padded([part.keys for part in parts], rows, longest, 0)
    values = _left_padded([part.values for part in parts], rows, longest, 0)
    keymap = None
    if any(is_short(part) for part in parts):
        key = (longest, total, *(id(getattr(part, "keymap", None)) for part in parts))
        if key not in keymaps:
            positions = [_key_positions(part)[:, None, :, None] for part in parts]
            columns = _left_padded(positions, rows, longest, -1)[:, 0, :, 0]
            keymaps[key] = KeyMap(columns, total - longest, bool((columns < 0).any()))
        keymap = keymaps[key]
    # `layer` may be one of the parts: it is changed only after everything has been read.
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if keymap is not None:
        become_short(layer, keymap, total)
    elif hasattr(layer, "cumulative_length"):
        layer.cumulative_length = total


def _key_positions(part: Any) -> Tensor:
    """Return the positions (B, K) of the keys that a group's cache layer holds."""
    count, batch = part.keys.shape[-2], part.keys.shape[0]
    positions: Tensor
    if is_short(part):
        positions = part.keymap.positions(stored_keys(part))
    else:
        positions = torch.arange(part.get_seq_length(), device=part.keys.device).expand(batch, -1)
    return positions[:, positions.shape[1] - count :]


def _left_padded(parts: Sequence[Tensor], rows: Sequence[Tensor], length: int, padding: int) -> Tensor:
    """Return (B, H, `length`, D) with the parts of all groups in the order of the batch.

    Args:
        parts: (b, H, k, D) tensor of each group.
        rows: (b,) rows of the batch that each group holds.
        length: The length of the result, at least each k.
        padding: The value on the left of shorter parts.
    """
    size = sum(part.shape[0] for part in parts), parts[0].shape[1], length, parts[0].shape[3]
    whole = parts[0].new_empty(size)
    for part, part_rows in zip(parts, rows, strict=True):
        missing = length - part.shape[2]
        index = part_rows.to(part.device)
        whole[index, :, :missing] = padding
        whole[index, :, missing:] = part
    return whole
