"""The time ratios that the FLOPs allow for a forward, a decoding step or a training step.

`CostModel` counts the FLOPs from the model's modules, for the batch as it is computed: padding counts for the
stock model and from the insert layer on; below it, each row costs what the row with most text costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from deepinsert.backbones import CostModel
from deepinsert.backbones.costs.module_costs import linear_flops
from deepinsert.backbones.families import base_model_of, find_stack
from deepinsert.backbones.parts import output_head, projectors

from .sample_batches import Batch

ATTENTION_BACKWARD = 2.5
"""FLOPs of attention's backward pass as a multiple of its forward pass: fused attention computes five matrix
products backward, one of which repeats one of the two forward."""

Setting = int | tuple[int, ...] | None
"""What an arm runs: None is the stock model, an int one insert layer, a tuple one layer per row."""


def rows_mean(setting: Setting, value_at: Callable[[int], float]) -> float:
    """Return the mean of `value_at(layer)` over the rows' layers."""
    layers: Sequence[int] = setting if isinstance(setting, tuple) else (setting or 0,)
    return sum(value_at(layer) for layer in layers) / len(layers)


def prefill_flops(costs: CostModel, batch: Batch, setting: Setting) -> float:
    """Return the FLOPs of the whole model's prefill of the batch, with the head at the last position."""
    decoder = rows_mean(setting, lambda layer: costs.decoder_flops(batch.text, batch.multimodal, layer))
    positions = 1 if costs.can_keep_logits else batch.length
    return batch.rows * (decoder + positions * costs.head) + _encoder_flops(costs, batch)


def decode_flops(costs: CostModel, batch: Batch, setting: Setting) -> float:
    """Return the FLOPs of the first decoding step, of one token per row, with attention to the cache."""

    def decoder(insert_layer: int) -> float:
        lengths = [batch.text if index < insert_layer else batch.length for index in range(costs.num_layers)]
        return sum(layer.flops(1, length + 1) for layer, length in zip(costs.layers, lengths, strict=True))

    return batch.rows * (rows_mean(setting, decoder) + costs.head)


def training_flops(
    model: Any, projector_flops: int, costs: CostModel, batch: Batch, layer: int | None
) -> float:
    """Return the FLOPs of forward and backward.

    The backward pass costs twice the forward pass for trainable weights, and once for frozen ones. The
    encoder is frozen; the loss is taken at every position.

    Args:
        model: the model in training, possibly wrapped by PEFT.
        projector_flops: FLOPs of the projectors per token, counted before PEFT wrapped the model.
        costs: costs of the model, counted before PEFT wrapped it.
        batch: the batch of a step.
        layer: the insert layer; None is the stock model.
    """
    total = _encoder_flops(costs, batch) + 2 * batch.multimodal_total * projector_flops
    for index, (module, cost) in enumerate(zip(find_stack(model).layers, costs.layers, strict=True)):
        rows = batch.text if index < (layer or 0) else batch.length
        trainable, frozen = _linear_flops(module)
        attention = (1 + ATTENTION_BACKWARD) * cost.per_pair * rows
        total += batch.rows * rows * (3 * trainable + 2 * frozen + attention)
    head = output_head(base_model_of(model))
    is_trainable = head is not None and any(weight.requires_grad for weight in head.parameters())
    return total + batch.rows * batch.length * costs.head * (3 if is_trainable else 2)


def projector_flops(model: Any) -> int:
    """Return the FLOPs of the model's projectors per multimodal token."""
    return linear_flops(projectors(base_model_of(model)).values())


def cache_bytes(costs: CostModel, batch: Batch, setting: Setting) -> float:
    """Return the bytes of keys and values after the prefill by `CostModel`, for rows of equal lengths."""
    per_row = rows_mean(setting, lambda layer: costs.kv_cache_bytes(batch.text, batch.multimodal, layer))
    return batch.rows * per_row


def _encoder_flops(costs: CostModel, batch: Batch) -> float:
    return costs.encoder.flops(batch.multimodal_total, batch.images) if batch.images else 0


def _linear_flops(layer: nn.Module) -> tuple[int, int]:
    """Return the FLOPs per row of a decoder layer's trainable matrices, and of its frozen ones."""
    trainable = sum(
        2 * module.in_features * module.out_features
        for module in layer.modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    )
    return trainable, linear_flops([layer]) - trainable
