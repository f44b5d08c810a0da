"""Observations of prompts for the layer policy: mean-pooled text, and optionally a summary of the images.

The text is observed through the frozen input embeddings (as in the paper), before any image is opened, or
through the hidden states after some decoder layers of text alone, which every deeper insertion computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
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
    """The part of a prompt that the policy observes, on a backbone of width D.

    Args:
        text_layer: 0 observes the mean of the input embeddings over the text tokens. k > 0 observes their
            mean hidden state after k decoder layers without multimodal tokens, at the positions of the full
            prompt, as every insertion at layer k or deeper computes it. This encodes no image; images are
            opened only for their sizes, which determine the positions of the text.
        image: Whether to append the mean of the projected image features at the decoder's input, and zeros
            for a prompt without images. Each image is encoded once.
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
        """The form that `--observation` takes, `"embeddings"` or `"hidden:3"`, followed by `"+image"`."""
        text = f"hidden:{self.text_layer}" if self.text_layer else "embeddings"
        return f"{text}+image" if self.image else text

    def __call__(self, backbone: Backbone, prompts: Sequence[Prompt], batch_size: int = 32) -> FloatArray:
        """Compute observations: float32 (P, D), or (P, 2 D) with an image summary.

        An observation does not depend on the answer. It depends on the other prompts and on `batch_size`,
        which bounds memory, at most in float32's last digits.

        Raises `ValueError` for no prompts, a prompt without text tokens, a `text_layer` that the backbone
        does not have, and a backbone whose image features or layers of text alone cannot be observed.
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
    """Mean of the frozen input embeddings over each prompt's text tokens, float32 (P, D).

    The text is the output of the model's chat template up to the generation prompt, without answer,
    placeholders and padding; no image is opened. `batch_size` bounds memory and does not change the result,
    since prompts are pooled one by one.

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
    """Mean hidden state of each prompt's text after decoder layers without multimodal tokens.

    The text is the output of the model's processor up to the generation prompt, including the tokens that it
    adds around its placeholders. No layer beyond `text_layer` runs. Ovis2's encoder embeds the tokens around
    an image; here, their embeddings are those of the vocabulary.

    Args:
        backbone: The backbone.
        prompts: The prompts (P).
        text_layer: Number of decoder layers to run, at least 1.
        batch_size: Prompts per forward, which bounds memory.

    Returns:
        float32 (P, D).

    Raises:
        ValueError: A prompt has no text token, or the backbone cannot run `text_layer` layers of text alone.
    """
    _check_text_layer(backbone, text_layer)
    pooled = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        inputs = encode(backbone.processor, batch, with_answers=False)
        # Positions depend on sizes and token types, which are integers; inputs of encoders are floats.
        integers = {name: value for name, value in inputs.items() if not value.is_floating_point()}
        for prompt, states in zip(batch, text_states(backbone, integers, text_layer), strict=True):
            if not len(states):
                raise ValueError(f"prompt {prompt.id!r} has no text token to observe")
            pooled.append(states.float().mean(dim=0).cpu().numpy())
    return np.stack(pooled)


def text_states(backbone: Backbone, inputs: Mapping[str, Tensor], text_layer: int) -> list[Tensor]:
    """Hidden states (T, D) of each row's T text tokens after `text_layer` layers of text alone.

    Raises `ValueError` for a decoder that passes several streams between layers, and for a configuration
    without placeholder tokens.
    """
    model = backbone.model
    inputs = to_model(inputs, model)
    multimodal = _multimodal_mask(backbone, inputs["input_ids"])
    counts = (inputs["attention_mask"].bool() & ~multimodal).sum(dim=1).tolist()
    stack: Any = find_stack(model)
    with insert_at(model, deepest_insert_layer(stack), multimodal_mask=multimodal):
        handle: RemovableHandle = stack.layers[text_layer - 1].register_forward_hook(_stop_after)
        output = _forward_until(handle, model, inputs)
    states = output[0] if isinstance(output, tuple) else output
    if states.ndim != 3:
        raise ValueError(
            f"{type(model).__name__} passes several streams from layer to layer (states of shape "
            f"{tuple(states.shape)}), which cannot be observed: use text_layer 0 (--observation embeddings)"
        )
    # Below the insert layer only text positions exist; shorter prompts have dummies on the left.
    return [row[len(row) - count :] for row, count in zip(states, counts, strict=True)]


def image_means(backbone: Backbone, prompts: Sequence[Prompt], batch_size: int = 32) -> FloatArray:
    """Mean of the projected features of each prompt's images at the decoder's input, float32 (P, D).

    The mean is zero for a prompt without images. Prompts about the same images share one pass through the
    encoder, with an empty question.
    """
    row_of: dict[tuple[Hashable, ...], int] = {}
    rows = [
        row_of.setdefault(_image_keys(prompt), len(row_of)) if prompt.images else -1 for prompt in prompts
    ]
    representatives = [_without_question(prompts[rows.index(row)]) for row in range(len(row_of))]
    embed: Any = backbone.model.get_input_embeddings()
    # The last row, of index -1, belongs to prompts without images.
    means = np.zeros((len(row_of) + 1, embed.weight.shape[1]), dtype=np.float32)
    for start in range(0, len(representatives), batch_size):
        batch = encode(backbone.processor, representatives[start : start + batch_size], with_answers=False)
        for row, features in enumerate(image_features(backbone, batch), start):
            means[row] = features.float().mean(dim=0).cpu().numpy()
    return means[rows]


def image_features(backbone: Backbone, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Projected features (M, D) of each row's M multimodal tokens at the decoder's input.

    Raises `ValueError` for a model that embeds image tokens inside its decoder.
    """
    model = backbone.model
    inputs = to_model(inputs, model)
    multimodal = _multimodal_mask(backbone, inputs["input_ids"])
    with insert_at(model, 0):
        handle = find_stack(model).register_forward_pre_hook(_stop_before, with_kwargs=True)
        embeds = _forward_until(handle, model, inputs)
    if embeds is None:
        raise ValueError(
            f"{type(model).__name__} embeds image tokens inside its decoder, where their features cannot be "
            "observed: leave the image out (no --observe-image)"
        )
    return [row[mask] for row, mask in zip(embeds, multimodal, strict=True)]


def _multimodal_mask(backbone: Backbone, input_ids: Tensor) -> Tensor:
    """Boolean mask (B, S) of the positions that an encoder's features fill."""
    if not backbone.placeholder_ids:
        raise ValueError(
            f"the configuration of {backbone.name!r} names no placeholder token, so image tokens cannot be "
            "distinguished from text: observe input embeddings alone (--observation embeddings, "
            "no --observe-image)"
        )
    return torch.isin(input_ids, torch.tensor(sorted(backbone.placeholder_ids), device=input_ids.device))


def _check_text_layer(backbone: Backbone, text_layer: int) -> None:
    """Raise `ValueError` where the backbone cannot run `text_layer` decoder layers of text alone."""
    deepest = deepest_insert_layer(find_stack(backbone.model))
    if text_layer > deepest:
        raise ValueError(
            f"text_layer {text_layer}: only the first {deepest} of the {backbone.num_layers} decoder layers "
            f"of {backbone.name!r} can run on text alone; observe hidden:{deepest} at most"
        )
    pixels = inspect.signature(backbone.model.forward).parameters.get("pixel_values")
    if pixels is not None and pixels.default is pixels.empty:
        raise ValueError(
            f"{type(backbone.model).__name__} cannot run without an image, so its text alone has no hidden "
            "states: use text_layer 0 (--observation embeddings)"
        )


def _image_keys(prompt: Prompt) -> tuple[Hashable, ...]:
    """Keys that are equal for prompts about the same files or the same open images."""
    return tuple(image if isinstance(image, ImageRef) else id(image) for image in prompt.images)


def _without_question(prompt: Prompt) -> Prompt:
    """The prompt's images with an empty question, so that no feature can depend on a question."""
    empty = {"type": "text", "text": ""}
    question = {"role": "user", "content": [*[{"type": "image"}] * len(prompt.images), empty]}
    return replace(prompt, messages=[question, {"role": "assistant", "content": [empty]}], answer="")


class _StopForward(Exception):
    """Ends a forward early; its argument is the value that the hook captured."""


def _stop_after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook that ends the forward with the module's output."""
    raise _StopForward(output)


def _stop_before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook that ends the forward with the decoder's input embeddings."""
    raise _StopForward(kwargs.get("inputs_embeds"))


def _forward_until(handle: RemovableHandle, model: Any, inputs: Mapping[str, Tensor]) -> Any:
    """Run a forward of `model` up to the hook of `handle`, remove the hook, and return what it captured."""
    try:
        with torch.inference_mode():
            model(**inputs, use_cache=False)
    except _StopForward as stop:
        return stop.args[0]
    finally:
        handle.remove()
    raise RuntimeError(f"{type(model).__name__} did not call its decoder")


@dataclass(frozen=True)
class Normaliser:
    """Mean and standard deviation of a training set's observations, each float32 (D,)."""

    mean: FloatArray
    std: FloatArray

    @classmethod
    def fit(cls, observations: ArrayLike) -> Normaliser:
        """Compute the statistics of `observations` (P, D); a constant feature keeps its scale (deviation 1).

        Raises `ValueError` for another shape, or for no prompts.
        """
        values = np.asarray(observations, dtype=np.float64)
        if values.ndim != 2 or not len(values):
            raise ValueError(
                f"observations of shape {values.shape}: expected (prompts, hidden), at least one prompt"
            )
        mean, std = values.mean(axis=0), values.std(axis=0)
        constant = std <= 1e-6 * np.maximum(np.abs(mean), 1e-6)
        return cls(mean.astype(np.float32), np.where(constant, 1.0, std).astype(np.float32))

    def __call__(self, observations: ArrayLike) -> FloatArray:
        """Normalise `observations` (..., D): `(observations - mean) / std`, clipped to [-10, 10], in float32.

        Raises `ValueError` for another width.
        """
        values = np.asarray(observations, dtype=np.float32)
        if values.shape[-1:] != self.mean.shape:
            raise ValueError(
                f"observations of shape {values.shape}: expected a last axis of {len(self.mean)}"
            )
        normalised: FloatArray = np.clip((values - self.mean) / self.std, -LIMIT, LIMIT)
        return normalised


def check_observations(observations: ArrayLike, num_prompts: int) -> FloatArray:
    """Convert observations (P, D) to float32 and clip them to the limits.

    Raises `ValueError` for another shape or number of prompts, and for values that are not finite.
    """
    values = np.asarray(observations, dtype=np.float32)
    if values.ndim != 2 or len(values) != num_prompts or not values.shape[1]:
        raise ValueError(f"observations of shape {values.shape}: expected ({num_prompts} prompts, hidden)")
    if not np.isfinite(values).all():
        raise ValueError(
            f"observations of prompt {int(np.argmin(np.isfinite(values).all(axis=1)))} are not finite"
        )
    return np.clip(values, -LIMIT, LIMIT)
