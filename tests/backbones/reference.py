"""What DeepInsert means, on a stock model that was never given an insert layer.

Below the insert layer text does not see multimodal columns, and a layer hands multimodal rows on as they
came. Nothing is gathered, no row is left out, no cache is used; no code is shared with the mechanism.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

REMOVED_FROM = ("linear_attn", "conv", "mamba")
"""Sublayers by which a layer hands a state from row to row: waiting rows must not be there at all."""


@contextmanager
def waiting_below(layers: nn.ModuleList, insert_layer: int, multimodal: Tensor) -> Iterator[None]:
    """Let the positions `multimodal` (S,) wait below `insert_layer`: eager attention, a row unpadded."""
    handles = []
    for layer in layers[:insert_layer]:
        names = list(inspect.signature(layer.forward).parameters)
        removes = any(hasattr(layer, name) for name in REMOVED_FROM)
        removes |= getattr(layer, "block_type", None) == "linear_attention"
        entered: list[Tensor] = []

        def before(
            module: Any,
            args: tuple,
            kwargs: dict,
            names: list[str] = names,
            removes: bool = removes,
            entered: list[Tensor] = entered,
        ) -> Any:
            call = dict(zip(names, args, strict=False)) | kwargs
            hidden = call.pop("hidden_states")
            entered[:] = [hidden]
            if removes:
                return (hidden[..., ~multimodal, :],), _without(call, ~multimodal)
            causal = getattr(getattr(module, "self_attn", None), "is_causal", True)
            call["attention_mask"] = _blind(call.get("attention_mask"), multimodal, hidden.dtype, causal)
            return (hidden,), call

        def after(
            module: Any,
            args: tuple,
            kwargs: dict,
            output: Any,
            removes: bool = removes,
            entered: list[Tensor] = entered,
        ) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            kept = entered.pop().clone()
            kept[..., ~multimodal, :] = hidden if removes else hidden[..., ~multimodal, :]
            return (kept, *output[1:]) if isinstance(output, tuple) else kept

        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without(call: dict[str, Any], kept: Tensor) -> dict[str, Any]:
    """A layer's arguments for the rows `kept` (S,) of a single row without padding."""
    mask = call.get("attention_mask")
    if mask is not None:
        mask = mask[..., kept, :][..., kept] if mask.ndim == 4 else mask[..., kept]
    changed: dict[str, Any] = {"attention_mask": mask}
    if call.get("position_ids") is not None:
        changed["position_ids"] = call["position_ids"][..., kept]
    if call.get("position_embeddings") is not None:
        changed["position_embeddings"] = tuple(table[..., kept, :] for table in call["position_embeddings"])
    return call | changed


def _blind(mask: Tensor | None, multimodal: Tensor, dtype: torch.dtype, causal: bool) -> Tensor:
    """The mask, with multimodal columns closed to text rows."""
    size = len(multimodal)
    closed = multimodal[None, :] & ~multimodal[:, None]
    if mask is None:
        mask = torch.zeros(1, 1, size, size, dtype=dtype)
        closed = closed | (torch.ones(size, size, dtype=torch.bool).triu(1) & causal)
    assert mask.ndim == 4, f"a mask of shape {tuple(mask.shape)} is not eager attention's"
    return mask.masked_fill(closed, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


def reference_logits(
    stock: Any, layers: nn.ModuleList, inputs: dict, insert_layer: int, multimodal: Tensor
) -> Tensor:
    """(S, V) logits of a single row without padding; `multimodal` (S,) bool. Eager attention."""
    assert inputs["input_ids"].shape[0] == 1
    with waiting_below(layers, insert_layer, multimodal):
        return stock(**inputs, use_cache=False).logits[0]
