"""What DeepInsert means, written as plainly as possible: one row, no padding, no cache, a loop over layers.

It shares no code with the mechanism. The stock model says what enters layer 0 and the rotary tables; below
the insert layer the multimodal rows and columns simply are not there.
"""

from __future__ import annotations

from typing import Any

import torch
from families import PLACEHOLDER
from torch import Tensor


def reference_logits(stock: Any, inputs: dict[str, Tensor], insert_layer: int) -> Tensor:
    """(S, V) logits of a single unpadded row by a model that was never given an insert layer."""
    assert inputs["input_ids"].shape[0] == 1
    stack = stock.get_decoder()
    entered: list[tuple[tuple, dict]] = []
    handle = stack.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: entered.append((args, kwargs)), with_kwargs=True
    )
    stock(**inputs, use_cache=False)
    handle.remove()
    (hidden,), kwargs = entered[0]
    cos, sin = kwargs["position_embeddings"]
    multimodal = inputs["input_ids"][0] == PLACEHOLDER

    for index, layer in enumerate(stack.layers):
        present = torch.arange(len(multimodal)) if index >= insert_layer else (~multimodal).nonzero()[:, 0]
        if not len(present):
            continue
        allowed = present[None, :] <= present[:, None]
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        out = layer(
            hidden[:, present],
            attention_mask=mask[None, None],
            position_embeddings=(cos[..., present, :], sin[..., present, :]),
            position_ids=None,
            past_key_values=None,
            use_cache=False,
        )
        hidden = hidden.index_copy(1, present, out)
    return stock.lm_head(stack.norm(hidden))[0]
