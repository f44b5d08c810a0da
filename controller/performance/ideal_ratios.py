"""What the FLOPs allow: the ratio to stock that a forward, a decoding step or a training step could reach.

Counted from the model's modules by `CostModel`, for the batch as it is computed: padding counts for the stock
model and from the insert layer on; below it each row costs what the row with most text costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from deepinsert.backbones import CostModel
from deepinsert.backbones.costs.module_costs import linear_flops
from deepinsert.backbones.families import base_model_of, find_stack
from deepinsert.backbones.parts import projectors

from .sample_batches import Batch

ATTENTION_BACKWARD = 2.5
"""Of its forward: fused attention multiplies five matrices backward, one of them again, against two."""

Setting = int | tuple[int, ...] | None
"""An arm: None is the stock model, an int one insert layer, a tuple a layer for each row."""


def rows_mean(setting: Setting, of: Any) -> float:
    """`of(layer)` in the mean over the rows' layers."""
    layers: Sequence[int] = setting if isinstance(setting, tuple) else (setting or 0,)
    return sum(of(layer) for layer in layers) / len(layers)


def prefill_flops(costs: CostModel, batch: Batch, setting: Setting) -> float:
    """FLOPs of the whole model's first forward on the batch, the head applied to the last position."""
    decoder = rows_mean(setting, lambda layer: costs.decoder_flops(batch.text, batch.multimodal, layer))
    positions = 1 if costs.can_keep_logits else batch.length
    return batch.rows * (decoder + positions * costs.head) + _encoder_flops(costs, batch)


def decode_flops(costs: CostModel, batch: Batch, setting: Setting) -> float:
    """FLOPs of the first forward over one new token a row: weights, and attention to the keys held."""

    def decoder(insert_layer: int) -> float:
        keys = [batch.text if index < insert_layer else batch.length for index in range(costs.num_layers)]
        return sum(layer.flops(1, held + 1) for layer, held in zip(costs.layers, keys, strict=True))

    return batch.rows * (rows_mean(setting, decoder) + costs.head)


def training_flops(
    model: Any, projector_flops: int, costs: CostModel, batch: Batch, layer: int | None
) -> float:
    """FLOPs of forward and backward: twice the forward for weights that learn, once for frozen ones.

    `costs` and `projector_flops` (of one token) are of the model before PEFT wrapped it. The encoder is
    frozen; the loss is taken at every position.
    """
    total = _encoder_flops(costs, batch) + 2 * batch.multimodal_total * projector_flops
    for index, (module, cost) in enumerate(zip(find_stack(model).layers, costs.layers, strict=True)):
        rows = batch.text if index < (layer or 0) else batch.length
        learning, frozen = _linear_flops(module)
        attention = (1 + ATTENTION_BACKWARD) * cost.per_pair * rows
        total += batch.rows * rows * (3 * learning + 2 * frozen + attention)
    head = base_model_of(model).get_output_embeddings()
    learns = any(weight.requires_grad for weight in head.parameters())
    return total + batch.rows * batch.length * costs.head * (3 if learns else 2)


def projector_flops(model: Any) -> int:
    """FLOPs of the model's projectors for one multimodal token."""
    return linear_flops(projectors(base_model_of(model)).values())


def cache_bytes(costs: CostModel, batch: Batch, setting: Setting) -> float:
    """Bytes of keys and values after the prefill by `CostModel`'s formula, for rows of equal lengths."""
    one = rows_mean(setting, lambda layer: costs.kv_cache_bytes(batch.text, batch.multimodal, layer))
    return batch.rows * one


def _encoder_flops(costs: CostModel, batch: Batch) -> float:
    return costs.encoder.flops(batch.multimodal_total, batch.images) if batch.images else 0


def _linear_flops(layer: nn.Module) -> tuple[int, int]:
    """FLOPs for one row of a decoder layer's matrices that learn, and of those that are frozen."""
    every = linear_flops([layer])
    learning = sum(
        2 * module.in_features * module.out_features
        for module in layer.modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    )
    return learning, every - learning
