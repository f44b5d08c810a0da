"""The training loss of a batch whose rows draw their insert layers, with in-place distillation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from deepinsert.backbones import insert_at
from deepinsert.backbones.compat.accelerate import is_sharded
from deepinsert.envs.prompts import IGNORED

from .depths import DepthSampler


def depth_loss(
    trainer: Trainer,
    depths: DepthSampler,
    stock_loss: Callable[..., Any],
    model: nn.Module,
    inputs: dict[str, Any],
    num_items_in_batch: Tensor | int | None = None,
) -> tuple[Tensor, Any]:
    """Compute the loss of one batch of B rows, each at the insert layer that it draws.

    If the weights are sharded, all rows of a step share one layer. While the model is evaluated, every row is
    at the layer that is installed on the model.

    Args:
        trainer: the trainer whose epoch and step decide the draws.
        depths: the sampler of insert layers.
        stock_loss: `compute_loss` of the stock `Trainer`.
        model: the model, perhaps in the wrapper of DDP or FSDP.
        inputs: model inputs with `labels` (B, S), and `row_index` (B,), the rows' positions in the data.
        num_items_in_batch: answer tokens of the whole optimiser step, over all processes.

    Returns:
        The loss and the model's outputs.
    """
    inputs = dict(inputs)
    positions = inputs.pop("row_index").tolist()
    if not model.training:
        stock_result: tuple[Tensor, Any] = stock_loss(model, inputs, True, num_items_in_batch)
        return stock_result
    sharded = is_sharded(trainer.accelerator.state)
    if sharded:
        layers = [depths.layer_of_step(trainer.state.global_step)]
    else:
        layers = depths.layers_of_rows(positions, int(trainer.state.epoch or 0))
    unwrapped = trainer.accelerator.unwrap_model(model)
    with insert_at(unwrapped, layers if len(layers) > 1 else layers[0]):
        loss, outputs = stock_loss(model, inputs, True, num_items_in_batch)
    is_student = depths.multimodal[positions] & (np.array(layers) > 0)
    if depths.distillation and (sharded or is_student.any()):
        labels = inputs.pop("labels")[:, 1:]
        is_answer = labels != IGNORED
        selected = is_answer & torch.from_numpy(is_student).to(labels.device)[:, None]
        teacher_logits = _stock_layer_logits(trainer, model, inputs)[:, :-1][selected]
        student_logits = outputs.logits[:, :-1][selected]
        change = _distillation_change(teacher_logits, student_logits, labels[selected], depths.distillation)
        loss = loss + _normalised(change, trainer, is_answer, num_items_in_batch)
    return loss, outputs


def _stock_layer_logits(trainer: Trainer, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return the logits (B, S, V) of the model at insert layer 0, without dropout and without a gradient."""
    unwrapped = trainer.accelerator.unwrap_model(model)
    # Calling the DDP wrapper is a collective operation: it broadcasts buffers. Not every process distils, so
    # the model itself is called. FSDP's wrapper gathers the weights; there every process distils.
    teacher = model if is_sharded(trainer.accelerator.state) else unwrapped
    model.eval()
    with torch.no_grad(), insert_at(unwrapped, 0):
        logits: Tensor = teacher(**inputs).logits
    model.train()
    return logits


def _distillation_change(
    teacher_logits: Tensor, student_logits: Tensor, labels: Tensor, weight: float
) -> Tensor:
    """Return what distillation adds to the summed cross-entropy of A answer tokens, in nats.

    In-place distillation of slimmable networks (Yu and Huang 2019, arXiv 1903.05134): the whole network
    learns from the labels, and its parts learn from the whole network's output, without a gradient to it.
    The share `weight` of the cross-entropy is replaced by the KL divergence from the teacher; the paper has
    weight 1.

    Args:
        teacher_logits: (A, V), at insert layer 0.
        student_logits: (A, V), at the rows' insert layers.
        labels: (A,), the answer tokens.
        weight: the share of the cross-entropy that is replaced, from 0 to 1.
    """
    teacher, student = (logits.float().log_softmax(dim=-1) for logits in (teacher_logits, student_logits))
    divergence = F.kl_div(student, teacher, log_target=True, reduction="sum")
    cross_entropy = F.nll_loss(student, labels, reduction="sum")
    return weight * (divergence - cross_entropy)


def _normalised(
    change: Tensor, trainer: Trainer, is_answer: Tensor, num_items_in_batch: Tensor | int | None
) -> Tensor:
    """Divide a sum over answer tokens as the stock `Trainer` divides its loss; `is_answer` is (B, S - 1)."""
    if not trainer.model_accepts_loss_kwargs or num_items_in_batch is None:
        return change / is_answer.sum()
    # Gradients are averaged over the processes, so the stock Trainer multiplies by their number.
    processes: int = trainer.accelerator.num_processes
    return change / num_items_in_batch * processes
