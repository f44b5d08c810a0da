"""Finds the positions that hold features, from what a model shows before it calls its decoder stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

POSITION_ARGUMENTS = ("image_embeds_position_mask",)
"""Arguments of a stack that mark, with 1 and 0, where the stack itself places features (Kosmos-2)."""


@dataclass
class ObservedPositions:
    """What a forward has shown about its positions before its stack is called.

    Args:
        input_ids: (B, S) token ids.
        embeddings: (B, S, D) output of the embedding layer.
        placeholders: (B, S) bool, where the model's `get_placeholder_mask` places features.
        has_model_ids: Whether the ids are those of the model's own call, not of its embedding layer's call.
    """

    input_ids: Tensor | None = None
    embeddings: Tensor | None = None
    placeholders: Tensor | None = None
    has_model_ids: bool = False

    def add_placeholders(self, masks: Any) -> None:
        """Add what `get_placeholder_mask` returned: one mask, or one per modality."""
        for mask in masks if isinstance(masks, tuple) else (masks,):
            if isinstance(mask, Tensor):
                flat = mask[..., 0] if mask.ndim == 3 else mask
                if self.placeholders is not None and self.placeholders.shape == flat.shape:
                    flat = self.placeholders | flat
                self.placeholders = flat

    def multimodal(
        self, embeds: Tensor, placeholder_ids: Sequence[int], explicit: Tensor | None
    ) -> Tensor | None:
        """Return which positions of the stack's input hold features; None if there are none.

        The sources, in this order: `explicit`, the model's own `get_placeholder_mask`, an embedding layer's
        output that reaches the stack unchanged, placeholder ids, and differences from that output.

        Args:
            embeds: (B, S, D) input of the stack.
            placeholder_ids: The token ids that stand for multimodal tokens.
            explicit: (B, S) bool mask that the caller gave to `insert_at`.

        Returns:
            (B, S) bool, or None.

        Raises:
            ValueError: No source shows the positions, or `explicit` has another shape.
        """
        length = embeds.shape[1]
        if explicit is not None and length > 1:
            return _for_batch(explicit, embeds)
        if _fits(self.placeholders, embeds):
            return _for_batch(self.placeholders, embeds)
        if self.embeddings is embeds:
            return None
        if _fits(self.input_ids, embeds) and placeholder_ids:
            ids = torch.tensor(placeholder_ids, device=self.input_ids.device)
            return _for_batch(torch.isin(self.input_ids, ids), embeds)
        if self.embeddings is not None and self.embeddings.shape == embeds.shape:
            return (self.embeddings != embeds).any(dim=-1)
        if length == 1:
            return None
        raise ValueError(
            "inputs_embeds without input_ids do not show which positions are multimodal: pass them with "
            "insert_at(model, layer, multimodal_mask=mask)"
        )


def positions_in_call(call: Mapping[str, Any]) -> Tensor | None:
    """Return the (B, S) bool mask of features among the arguments of the stack; None if there is none.

    In a later turn on a kept cache, Kosmos-2.5 reads the images that the mask marks, and Kosmos-2 ignores
    them. The mask is returned in both cases.
    """
    for name in POSITION_ARGUMENTS:
        if call.get(name) is not None:
            mask: Tensor = call[name].bool()
            return mask
    return None


def _fits(values: Tensor | None, embeds: Tensor) -> TypeGuard[Tensor]:
    """Whether `values` (B, S) belong to `embeds`, whose rows BLIP-2's `generate` repeats after embedding."""
    if values is None or values.shape[1] != embeds.shape[1]:
        return False
    return embeds.shape[0] % values.shape[0] == 0


def _for_batch(mask: Tensor, embeds: Tensor) -> Tensor:
    """Return a mask (B, S) as bool for this forward, whose rows may be repeated (beams).

    Raises `ValueError` if the shape does not fit `embeds`.
    """
    batch, length = embeds.shape[:2]
    if mask.ndim != 2 or mask.shape[1] != length or batch % mask.shape[0]:
        raise ValueError(
            f"multimodal_mask of shape {tuple(mask.shape)} for inputs of shape {(batch, length)}: give one "
            "row per row of the batch, and one value per position"
        )
    return mask.to(embeds.device, torch.bool).repeat_interleave(batch // mask.shape[0], dim=0)


def real_positions(mask: Any, multimodal: Tensor, past: int) -> Tensor:
    """Return which new positions are not padding, as far as the attention mask shows it.

    Args:
        mask: The stack's attention mask. Only a 2-D mask (B, P+S) shows padding. For a static cache it may be
            as long as the cache from the start.
        multimodal: (B, S) bool; gives the shape and the device.
        past: The number P of earlier positions.
    """
    length = multimodal.shape[1]
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < past + length:
        return torch.ones_like(multimodal)
    return mask[:, past : past + length].to(device=multimodal.device, dtype=torch.bool)
