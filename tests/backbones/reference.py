"""A reference implementation of DeepInsert on a stock model without an insert layer.

Below the insert layer, text does not attend to multimodal columns, and a layer returns multimodal rows
unchanged. The reference gathers nothing, leaves out no row, uses no cache and shares no code with the
mechanism.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

REMOVED_FROM = ("linear_attn", "conv", "mamba")
"""Sublayers that carry a state from row to row, so that waiting rows must be removed from the layer."""


@contextmanager
def waiting_below(layers: nn.ModuleList, insert_layer: int, multimodal: Tensor) -> Iterator[None]:
    """Let the positions `multimodal` (S,) of an unpadded row wait below `insert_layer` (eager attention)."""
    handles = []
    for layer in layers[:insert_layer]:
        names = list(inspect.signature(layer.forward).parameters)
        removes = any(hasattr(layer, name) for name in REMOVED_FROM)
        removes |= getattr(layer, "block_type", None) == "linear_attention"
        layer_input: list[Tensor] = []

        def before(
            module: Any,
            args: tuple,
            kwargs: dict,
            names: list[str] = names,
            removes: bool = removes,
            layer_input: list[Tensor] = layer_input,
        ) -> Any:
            call = dict(zip(names, args, strict=False)) | kwargs
            hidden = call.pop("hidden_states")
            layer_input[:] = [hidden]
            if removes:
                return (hidden[..., ~multimodal, :],), _select_rows(call, ~multimodal)
            causal = getattr(getattr(module, "self_attn", None), "is_causal", True)
            mask = call.get("attention_mask")
            call["attention_mask"] = _hide_multimodal(mask, multimodal, hidden.dtype, causal)
            return (hidden,), call

        def after(
            module: Any,
            args: tuple,
            kwargs: dict,
            output: Any,
            removes: bool = removes,
            layer_input: list[Tensor] = layer_input,
        ) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            changed = layer_input.pop().clone()
            changed[..., ~multimodal, :] = hidden if removes else hidden[..., ~multimodal, :]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _select_rows(call: dict[str, Any], is_text: Tensor) -> dict[str, Any]:
    """Return a layer's arguments for the text positions `is_text` (S,), bool, of one unpadded row."""
    mask = call.get("attention_mask")
    if mask is not None:
        mask = mask[..., is_text, :][..., is_text] if mask.ndim == 4 else mask[..., is_text]
    selected: dict[str, Any] = {"attention_mask": mask}
    if call.get("position_ids") is not None:
        selected["position_ids"] = call["position_ids"][..., is_text]
    if call.get("position_embeddings") is not None:
        selected["position_embeddings"] = tuple(
            table[..., is_text, :] for table in call["position_embeddings"]
        )
    return call | selected


def _hide_multimodal(mask: Tensor | None, multimodal: Tensor, dtype: torch.dtype, causal: bool) -> Tensor:
    """Return the attention mask with multimodal columns hidden from text rows.

    Args:
        mask: The stock mask (1, 1, S, S); None means plain causal, or none if not `causal`.
        multimodal: (S,) bool, the multimodal positions.
        dtype: The precision of the mask.
        causal: Whether the attention is causal.
    """
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
    """Return the logits (S, V) of a single row without padding, computed with eager attention.

    Args:
        stock: A stock model with eager attention.
        layers: Its decoder layers.
        inputs: Its inputs for one row.
        insert_layer: The layer at which multimodal tokens enter.
        multimodal: (S,) bool, the multimodal positions.
    """
    assert inputs["input_ids"].shape[0] == 1
    with waiting_below(layers, insert_layer, multimodal):
        return stock(**inputs, use_cache=False).logits[0]
