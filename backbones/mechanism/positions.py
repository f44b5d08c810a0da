"""Which positions of a forward hold features: what the model shows of it on its way to the decoder stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

POSITION_ARGUMENTS = ("image_embeds_position_mask",)
"""Arguments of a stack that say, with 1 and 0, where it puts the features itself (Kosmos-2)."""


@dataclass
class Sightings:
    """What one forward has shown before its stack is called."""

    input_ids: Tensor | None = None
    embedded: Tensor | None = None
    """(B, S, D) what the embedding layer returned."""
    scattered: Tensor | None = None
    """(B, S) bool where the model's `get_placeholder_mask` said that features go."""
    entered: bool = False
    """Whether the model itself was given the ids, and not its embedding layer alone."""

    def see_placeholders(self, result: Any) -> None:
        """What `get_placeholder_mask` returned: one mask, or one for each modality."""
        for mask in result if isinstance(result, tuple) else (result,):
            if isinstance(mask, Tensor):
                flat = mask[..., 0] if mask.ndim == 3 else mask
                seen = self.scattered
                self.scattered = flat if seen is None or seen.shape != flat.shape else seen | flat

    def multimodal(
        self, embeds: Tensor, placeholder_ids: Sequence[int], explicit: Tensor | None
    ) -> Tensor | None:
        """(B, S) bool of the positions of `embeds` (B, S, D) that hold features; None where there are none.

        In this order: the mask that the caller gave (`explicit`), the model's own word, an untouched output
        of the embedding layer, placeholder ids, and what differs from the embedding layer's output. Raises
        `ValueError` where nothing says it.
        """
        length = embeds.shape[1]
        if explicit is not None and length > 1:
            return _for_batch(explicit, embeds)
        if _fits(self.scattered, embeds):
            return _for_batch(self.scattered, embeds)
        if self.embedded is embeds:
            return None
        if _fits(self.input_ids, embeds) and placeholder_ids:
            ids = torch.tensor(placeholder_ids, device=self.input_ids.device)
            return _for_batch(torch.isin(self.input_ids, ids), embeds)
        if self.embedded is not None and self.embedded.shape == embeds.shape:
            return (self.embedded != embeds).any(dim=-1)
        if length == 1:
            return None
        raise ValueError(
            "inputs_embeds without input_ids do not say which positions are multimodal: pass them with "
            "insert_at(model, layer, multimodal_mask=mask)"
        )


def told_positions(call: Mapping[str, Any]) -> Tensor | None:
    """(B, S) bool of the positions that a call of the stack names itself; None where it names none.

    Also in a later turn on a kept cache, whose images Kosmos-2.5 reads, and Kosmos-2 leaves out.
    """
    for name in POSITION_ARGUMENTS:
        if call.get(name) is not None:
            return call[name].bool()
    return None


def _fits(seen: Tensor | None, embeds: Tensor) -> TypeGuard[Tensor]:
    """Whether `seen` (B, S) is of `embeds`, whose rows BLIP-2's `generate` repeats after embedding them."""
    return seen is not None and seen.shape[1] == embeds.shape[1] and embeds.shape[0] % seen.shape[0] == 0


def _for_batch(mask: Tensor, embeds: Tensor) -> Tensor:
    """A `multimodal_mask` (B, S) as bool for this forward, whose rows may be repeated (beams)."""
    batch, length = embeds.shape[:2]
    if mask.ndim != 2 or mask.shape[1] != length or batch % mask.shape[0]:
        raise ValueError(
            f"multimodal_mask of shape {tuple(mask.shape)} for inputs of shape {(batch, length)}: give one "
            "row for each row of the batch, one value for each position"
        )
    return mask.to(embeds.device, torch.bool).repeat_interleave(batch // mask.shape[0], dim=0)


def real_positions(mask: Any, multimodal: Tensor, past: int) -> Tensor:
    """(B, S) bool of the positions that are no padding, as far as a 2-D `mask` (B, P+S) says it.

    `past` is P; a mask for a static cache may be as long as that from the start.
    """
    length = multimodal.shape[1]
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < past + length:
        return torch.ones_like(multimodal)
    return mask[:, past : past + length].to(device=multimodal.device, dtype=torch.bool)
