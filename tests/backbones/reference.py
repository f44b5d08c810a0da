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


@contextmanager
def waiting_below(layers: nn.ModuleList, insert_layer: int, multimodal: Tensor) -> Iterator[None]:
    """Let the positions `multimodal` (S,) wait below `insert_layer`: eager attention, a row unpadded."""
    handles = []
    for layer in layers[:insert_layer]:
        names = list(inspect.signature(layer.forward).parameters)
        recurrent = any(hasattr(layer, name) for name in ("linear_attn", "conv", "mamba"))

        def before(module: Any, args: tuple, kwargs: dict, names: list[str] = names) -> Any:
            call = dict(zip(names, args, strict=False)) | kwargs
            hidden = call.pop("hidden_states")
            causal = getattr(getattr(module, "self_attn", None), "is_causal", True)
            call["attention_mask"] = _blind(call.get("attention_mask"), multimodal, hidden.dtype, causal)
            return (hidden,), call

        def after(module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            kept = hidden.clone()
            kept[..., multimodal, :] = args[0][..., multimodal, :]
            return (kept, *output[1:]) if isinstance(output, tuple) else kept

        assert not recurrent, "a recurrent layer needs its rows removed, not masked"
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
