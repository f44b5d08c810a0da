"""What the policy sees of a prompt: its text, mean-pooled, and optionally a summary of its images.

The text is seen through the frozen input embeddings (paper), before any image is opened, or after some
decoder layers of text alone, which an insertion above them computes in any case.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deepinsert.backbones.families import deepest_insert_layer, find_stack
from deepinsert.backbones.loading import to_model
from deepinsert.backbones.mechanism.insertion import insert_at

from .prompts import ImageRef, Prompt, encode, text_token_ids

if TYPE_CHECKING:
    from deepinsert.backbones import Backbone

FloatArray = NDArray[np.float32]

LIMIT = 10.0
"""Observations are clipped to [-LIMIT, LIMIT] standard deviations."""


@dataclass(frozen=True)
class Observation:
    """What to observe of prompts on a backbone of width D.

    `text_layer` 0 is the mean of the input embeddings over the text tokens; k their mean hidden state after k
    decoder layers in which multimodal tokens do not exist, text standing where it stands in the full prompt:
    what any insertion at layer k or above computes anyway. No image is encoded for it; images are opened for
    their sizes alone, which say where the text stands. `image` appends the mean of the projected image
    features as they enter the decoder, zeros for a prompt without image; each image is encoded once.
    """

    text_layer: int = 0
    image: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.text_layer, bool) or not isinstance(self.text_layer, int) or self.text_layer < 0:
            raise ValueError(
                f"text_layer {self.text_layer!r}: give 0 (input embeddings) or a number of decoder layers"
            )

    @property
    def name(self) -> str:
        """`"embeddings"` or `"hidden:3"`, as `--observation` takes it, with `"+image"` behind it."""
        text = f"hidden:{self.text_layer}" if self.text_layer else "embeddings"
        return f"{text}+image" if self.image else text

    def __call__(self, backbone: Backbone, prompts: Sequence[Prompt], batch_size: int = 32) -> FloatArray:
        """Observations float32 (P, D), with an image summary (P, 2 D).

        What is seen of a prompt depends neither on its answer nor, beyond float32's last digits, on the
        others or on `batch_size`, which bounds the memory.

        Raises `ValueError` for no prompts, a prompt without text tokens, a `text_layer` that the backbone
        does not have, and a backbone that shows its features or its layers of text alone to nobody.
        """
        if not prompts:
            raise ValueError("no prompts to observe")
        if self.text_layer:
            text = prompt_states(backbone, prompts, self.text_layer, batch_size)
        else:
            text = prompt_embeddings(backbone, prompts, batch_size)
        if not self.image:
            return text
        return np.concatenate([text, image_means(backbone, prompts, batch_size)], axis=1)


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


def prompt_states(
    backbone: Backbone, prompts: Sequence[Prompt], text_layer: int, batch_size: int = 32
) -> FloatArray:
    """Mean hidden state after `text_layer` decoder layers of text alone, float32 (P, hidden); see
    `Observation`.

    The text is what the model's processor makes of the messages up to the generation prompt, with the tokens
    that it writes around its placeholders. No layer beyond `text_layer` runs. Ovis2 embeds tokens around an
    image by its encoder; they are seen here as the vocabulary has them.
    """
    _check_text_layer(backbone, text_layer)
    pooled = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        inputs = encode(backbone.processor, batch, with_answers=False)
        # Sizes and token types, which positions follow from, are whole numbers; what is encoded is not.
        told = {name: value for name, value in inputs.items() if not value.is_floating_point()}
        for prompt, states in zip(batch, text_states(backbone, told, text_layer), strict=True):
            if not len(states):
                raise ValueError(f"prompt {prompt.id!r} has no text token to observe")
            pooled.append(states.float().mean(dim=0).cpu().numpy())
    return np.stack(pooled)


def text_states(backbone: Backbone, inputs: Mapping[str, Tensor], text_layer: int) -> list[Tensor]:
    """Hidden states (T, hidden) of each row's T text tokens after `text_layer` layers of text alone."""
    model = backbone.model
    inputs = to_model(inputs, model)
    multimodal = _multimodal(backbone, inputs["input_ids"])
    counts = (inputs["attention_mask"].bool() & ~multimodal).sum(dim=1).tolist()
    stack: Any = find_stack(model)
    with insert_at(model, deepest_insert_layer(stack), multimodal_mask=multimodal):
        handle: RemovableHandle = stack.layers[text_layer - 1].register_forward_hook(_stop_after)
        output = _forward_until(handle, model, inputs)
    states = output[0] if isinstance(output, tuple) else output
    if states.ndim != 3:
        raise ValueError(
            f"{type(model).__name__} carries several streams from layer to layer (states of shape "
            f"{tuple(states.shape)}), which are not observed: use text_layer 0 (--observation embeddings)"
        )
    # Below the insert layer only text rows exist, shorter prompts with dummies on their left.
    return [row[len(row) - count :] for row, count in zip(states, counts, strict=True)]


def image_means(backbone: Backbone, prompts: Sequence[Prompt], batch_size: int = 32) -> FloatArray:
    """Mean of the projected features of each prompt's images as they enter the decoder, float32 (P, hidden);
    zeros without images.

    Prompts about the same images share one pass through the encoder, in which no question is asked.
    """
    rows: dict[tuple, int] = {}
    own = [rows.setdefault(_images_of(prompt), len(rows)) if prompt.images else -1 for prompt in prompts]
    shown = [_without_question(prompts[own.index(row)]) for row in range(len(rows))]
    embed: Any = backbone.model.get_input_embeddings()
    # The last row is that of prompts without images.
    means = np.zeros((len(rows) + 1, embed.weight.shape[1]), dtype=np.float32)
    for start in range(0, len(shown), batch_size):
        batch = encode(backbone.processor, shown[start : start + batch_size], with_answers=False)
        for row, features in enumerate(image_features(backbone, batch), start):
            means[row] = features.float().mean(dim=0).cpu().numpy()
    return means[own]


def image_features(backbone: Backbone, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Projected features (M, hidden) of each row's M multimodal tokens, as they are handed to the decoder."""
    model = backbone.model
    inputs = to_model(inputs, model)
    multimodal = _multimodal(backbone, inputs["input_ids"])
    with insert_at(model, 0):
        handle = find_stack(model).register_forward_pre_hook(_stop_before, with_kwargs=True)
        embeds = _forward_until(handle, model, inputs)
    if embeds is None:
        raise ValueError(
            f"{type(model).__name__} embeds image tokens inside its decoder, where their features cannot be "
            "seen: leave the image out (no --observe-image)"
        )
    return [row[where] for row, where in zip(embeds, multimodal, strict=True)]


def _multimodal(backbone: Backbone, input_ids: Tensor) -> Tensor:
    """(B, S) bool of the positions that an encoder's features fill."""
    if not backbone.placeholder_ids:
        raise ValueError(
            f"the configuration of {backbone.name!r} names no placeholder token, so image tokens cannot be "
            "told from text: observe input embeddings alone (--observation embeddings, no --observe-image)"
        )
    return torch.isin(input_ids, torch.tensor(sorted(backbone.placeholder_ids), device=input_ids.device))


def _check_text_layer(backbone: Backbone, text_layer: int) -> None:
    deepest = deepest_insert_layer(find_stack(backbone.model))
    if text_layer > deepest:
        raise ValueError(
            f"text_layer {text_layer}: text can be alone in the first {deepest} of the {backbone.num_layers} "
            f"decoder layers of {backbone.name!r}; observe hidden:{deepest} at most"
        )
    pixels = inspect.signature(backbone.model.forward).parameters.get("pixel_values")
    if pixels is not None and pixels.default is pixels.empty:
        raise ValueError(
            f"{type(backbone.model).__name__} runs with an image alone, so its hidden states of text cannot "
            "be had without encoding one: use text_layer 0 (--observation embeddings)"
        )


def _images_of(prompt: Prompt) -> tuple:
    """Tells the images of prompts apart."""
    return tuple(image if isinstance(image, ImageRef) else id(image) for image in prompt.images)


def _without_question(prompt: Prompt) -> Prompt:
    """The prompt's images with nothing asked, so that no feature can depend on a question."""
    nothing = {"type": "text", "text": ""}
    asked = {"role": "user", "content": [*[{"type": "image"}] * len(prompt.images), nothing]}
    return replace(prompt, messages=[asked, {"role": "assistant", "content": [nothing]}], answer="")


class _Seen(Exception):
    """Ends a forward of which enough has been seen."""


def _stop_after(module: nn.Module, args: tuple, output: Any) -> None:
    raise _Seen(output)


def _stop_before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    raise _Seen(kwargs.get("inputs_embeds"))


def _forward_until(handle: RemovableHandle, model: Any, inputs: Mapping[str, Tensor]) -> Any:
    """What the hook of `handle` has seen of a forward of `model`, which goes no further."""
    try:
        with torch.inference_mode():
            model(**inputs, use_cache=False)
    except _Seen as seen:
        return seen.args[0]
    finally:
        handle.remove()
    raise RuntimeError(f"{type(model).__name__} did not call its decoder")


@dataclass(frozen=True)
class Normaliser:
    """Frozen statistics of the observations of a training set, each float32 (D,)."""

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
