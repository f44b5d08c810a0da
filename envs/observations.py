"""What the policy sees of a prompt: its text, mean-pooled through the frozen input embeddings.

Multimodal tokens do not enter, so an insert layer can be chosen before any image is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from .prompts import Prompt, text_token_ids

if TYPE_CHECKING:
    from backbones import Backbone

FloatArray = NDArray[np.float32]

LIMIT = 10.0
"""Observations are clipped to [-LIMIT, LIMIT] standard deviations."""


def prompt_embeddings(backbone: Backbone, prompts: Sequence[Prompt], batch_size: int = 32) -> FloatArray:
    """Mean of the frozen input embeddings over each prompt's text tokens, float32 (P, hidden).

    The text is what the model's chat template makes of the messages up to the generation prompt: neither
    the answer nor placeholders nor padding enter, and no image is opened. `batch_size` bounds the memory
    and changes nothing else: prompts are pooled one by one.

    Raises `ValueError` for a prompt without text tokens.
    """
    embed = backbone.model.get_input_embeddings()
    weight_device = next(embed.parameters()).device
    pooled = []
    with torch.inference_mode():
        for start in range(0, len(prompts), batch_size):
            batch = text_token_ids(backbone.processor, prompts[start : start + batch_size])
            if not all(batch):
                empty = prompts[start + batch.index([])].id
                raise ValueError(f"prompt {empty!r} has no text token to observe")
            vectors = embed(torch.tensor([token for ids in batch for token in ids], device=weight_device))
            for part in vectors.float().split([len(ids) for ids in batch]):
                pooled.append(part.mean(dim=0).cpu().numpy())
    return np.stack(pooled)


@dataclass(frozen=True)
class Observation:
    """What is observed of a prompt: the mean input embedding of its text (paper)."""

    text_layer: int = 0
    image: bool = False

    def __call__(self, backbone: Backbone, prompts: Sequence[Prompt], batch_size: int = 32) -> FloatArray:
        """Observations (P, D) of the prompts."""
        return prompt_embeddings(backbone, prompts, batch_size)


@dataclass(frozen=True)
class Normaliser:
    """Frozen statistics of the observations of a training set, each float32 (hidden,)."""

    mean: FloatArray
    std: FloatArray

    @classmethod
    def fit(cls, observations: ArrayLike) -> Normaliser:
        """Mean and deviation over the prompts of `observations` (P, hidden); a constant feature's is 1."""
        values = np.asarray(observations, dtype=np.float64)
        if values.ndim != 2 or not len(values):
            raise ValueError(
                f"observations of shape {values.shape}: expected (prompts, hidden), at least one prompt"
            )
        mean, std = values.mean(axis=0), values.std(axis=0)
        constant = std <= 1e-6 * np.maximum(np.abs(mean), 1e-6)
        return cls(mean.astype(np.float32), np.where(constant, 1.0, std).astype(np.float32))

    def __call__(self, observations: ArrayLike) -> FloatArray:
        """`(observations - mean) / std`, clipped to [-10, 10], float32 in the shape given."""
        values = np.asarray(observations, dtype=np.float32)
        if values.shape[-1:] != self.mean.shape:
            raise ValueError(
                f"observations of shape {values.shape}: expected a last axis of {len(self.mean)}"
            )
        return np.clip((values - self.mean) / self.std, -LIMIT, LIMIT)


def check_observations(observations: ArrayLike, num_prompts: int) -> FloatArray:
    """Finite float32 observations (P, hidden) within the limits; `ValueError` for another shape or a NaN."""
    values = np.asarray(observations, dtype=np.float32)
    if values.ndim != 2 or len(values) != num_prompts or not values.shape[1]:
        raise ValueError(f"observations of shape {values.shape}: expected ({num_prompts} prompts, hidden)")
    if not np.isfinite(values).all():
        raise ValueError(
            f"observations of prompt {int(np.argmin(np.isfinite(values).all(axis=1)))} are not finite"
        )
    return np.clip(values, -LIMIT, LIMIT)
