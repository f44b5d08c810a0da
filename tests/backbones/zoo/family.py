"""Small models of real families, built from their configurations with random weights, and their batches.

A family defines how its model is built, and what its images, videos or sounds become: model inputs, and a run
of prompt tokens each. Everything else is shared, also padding and placing these runs among the words.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from deepinsert.backbones import UnsupportedModelError, insert_at

PINNED = re.search(
    r"^transformers==(\S+)", (Path(__file__).parents[3] / "constraints.txt").read_text(), re.M
)[1]
"""The version that `make test` runs."""

LAYERS = 4
PAD = 0
BOS = 1
EOS = 2
PLACEHOLDER = 5
WORDS = range(20, 64)
"""Token ids of ordinary words; those below are left to a family's special tokens."""

TEXT: dict[str, Any] = {
    "vocab_size": WORDS.stop,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
"""Settings that most text configurations take."""

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}

Row = Sequence[int]
"""The parts of a row: (3, 0, 4) is three words, one image (video, sound), and four words."""


@dataclass(frozen=True)
class Media:
    """The model inputs of all images of a batch, and the prompt tokens that each image becomes, in order.

    Tokens may hold a family's wrapping text tokens (image start, row ends) beside its placeholders.
    """

    inputs: dict[str, Tensor]
    tokens: list[list[int]]


NO_MEDIA = Media({}, [])


@dataclass(frozen=True)
class Family:
    """A model family.

    `media(model, seeds)` makes its images. `seeds` has one list per row of the batch, with one seed for each
    image. The same seed must always give the same image, so that a row alone can be compared with the same
    row in a batch. If no row has an image, it returns `NO_MEDIA`.
    """

    name: str
    """The `model_type` of the configuration, with `-video` or `-audio` behind it for a further modality."""
    build: Callable[[], PreTrainedModel]
    media: Callable[[PreTrainedModel, list[list[int]]], Media]
    placeholders: frozenset[int] = frozenset({PLACEHOLDER})
    """Prompt token ids whose positions hold features."""
    finish: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    """A function that adds the inputs that follow from ids and mask, such as `mm_token_type_ids`."""
    scale: float = 4.0
    """The factor on the initial matrices; it is large, so that a wrong row shows in the logits."""
    rows: tuple[Row, ...] = ((3, 0, 4), (5,), (2, 0, 3, 0, 2), (0, 6))
    """A ragged batch with one, no and two images, or another batch if the family cannot have this one."""
    deepest: int = LAYERS
    """The deepest insert layer that is allowed."""
    without: Mapping[str, str] = field(default_factory=dict)
    """Promises that the stock model itself does not keep, with the reason; see `test_models.py`."""
    pads_right: str = ""
    """Why rows are padded on the right only: the error of the stock model with padding on the left."""
    generates_alone: str = ""
    """Why rows generate one by one: the error of the stock model in a padded batch."""
    broken_in: str = ""
    """The version of transformers, if it is the pinned one, in which the stock model does not work."""
    remark: str = ""
    """A remark for `docs/models.md`, such as what insertion means in this family."""

    def model(self, seed: int = 0, attention: str = "sdpa") -> PreTrainedModel:
        """Build the stock model, or skip the test if this version of transformers cannot run it."""
        torch.manual_seed(seed)
        with skipping_what_is_missing():
            model = self.build().eval()
        if attention != "sdpa":
            model.set_attn_implementation(attention)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim >= 2:
                    weight.mul_(self.scale)
        # Random weights may generate the end token or a placeholder, but generation tests need words only. In
        # some models it is the inner language model that generates.
        for part in model.modules():
            if isinstance(getattr(part, "generation_config", None), GenerationConfig):
                part.generation_config.eos_token_id = None
                part.generation_config.suppress_tokens = list(range(WORDS.start))
        if self.name not in _STOCK_ERRORS:
            _STOCK_ERRORS[self.name] = _stock_error(self, model)
        if _STOCK_ERRORS[self.name]:
            if transformers.__version__ == self.broken_in:
                pytest.skip(f"transformers {self.broken_in}: {_STOCK_ERRORS[self.name]}")
            skip_here(_STOCK_ERRORS[self.name])
        return model

    def batch(
        self,
        model: PreTrainedModel,
        rows: Sequence[Row] | None = None,
        padding: str = "left",
        *,
        only: int | None = None,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Return the model inputs of a batch.

        Args:
            model: The family's model.
            rows: The rows; None means those of the family.
            padding: "left" or "right".
            only: The index of a row to return alone, with the same words and images, unpadded.
            seed: The seed of the words and images.
        """
        rows = self.rows if rows is None else rows
        padding = "right" if self.pads_right else padding
        indices = range(len(rows)) if only is None else [only]
        seeds = [
            [1000 * seed + 100 * row + place for place, part in enumerate(rows[row]) if part == 0]
            for row in indices
        ]
        media = self.media(model, seeds) if any(seeds) else NO_MEDIA
        pending = iter(media.tokens)
        sequences = []
        for row in indices:
            words = torch.Generator().manual_seed(1000 * seed + row)
            ids: list[int] = []
            for part in rows[row]:
                if part == 0:
                    ids += next(pending)
                else:
                    ids += torch.randint(WORDS.start, WORDS.stop, (part,), generator=words).tolist()
            sequences.append(ids)
        inputs = _pad(sequences, padding) | media.inputs
        inputs = inputs if self.finish is None else self.finish(inputs)
        # Older versions derive the types of tokens from their ids.
        arguments = inspect.signature(type(model).forward).parameters
        return {
            name: each for name, each in inputs.items() if name in arguments or "token_type_ids" not in name
        }

    def multimodal(self, ids: Tensor) -> Tensor:
        """Return the positions (B, S), bool, that hold features."""
        return torch.isin(ids, torch.tensor(sorted(self.placeholders)))


_STOCK_ERRORS: dict[str, str] = {}
"""The error of the stock model in this version of transformers, by family; empty if there is none."""


def _stock_error(family: Family, model: PreTrainedModel) -> str:
    """Return why the stock model cannot be compared with; an empty string if it can.

    It may fail, or give a row other logits in a batch or with eager attention, which the reference uses.
    """
    try:
        inputs = family.batch(model)
        unknown = set(inputs) - set(inspect.signature(type(model).forward).parameters)
        if unknown:
            return f"the stock model takes no {', '.join(sorted(unknown))}"
        together = logits_of(model, inputs)
        media_names = ("pixel_values", "input_features")
        others = {name: 2 * each for name, each in inputs.items() if name in media_names}
        if others and torch.equal(together, logits_of(model, inputs | others)):
            return f"the stock model ignores {', '.join(others)}"
        plain = copy.deepcopy(model)
        plain.set_attn_implementation("eager")
        for row, real in enumerate(inputs["attention_mask"].bool()):
            alone = family.batch(model, only=row)
            if not torch.allclose(together[row][real], logits_of(model, alone)[0], atol=1e-3, rtol=1e-3):
                return "the stock model gives a row of a batch other logits than the row alone"
            if not torch.allclose(logits_of(plain, alone), logits_of(model, alone), atol=1e-3, rtol=1e-3):
                return "the stock model gives other logits with eager attention"
    except Exception as error:
        return f"the stock model fails: {_in_a_line(error)}"
    return ""


def _in_a_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def skip_here(reason: str) -> None:
    """Skip the test with a reason; under the pinned version of transformers, let it fail instead."""
    reason = f"transformers {transformers.__version__}: {reason}"
    if transformers.__version__ == PINNED:
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def skipping_what_is_missing() -> Iterator[None]:
    """Skip the test if this version of transformers lacks the model type, or this form of it."""
    try:
        yield
    except UnsupportedModelError as error:
        if transformers.__version__ == PINNED:
            raise
        skip_here(f"it is refused: {_in_a_line(error)}")
    except Exception as error:
        if transformers.__version__ == PINNED:
            raise
        lacks = isinstance(error, AttributeError) and "transformers" in getattr(error.obj, "__name__", "")
        skip_here(f"there is no {error.name}" if lacks else f"it cannot be built: {_in_a_line(error)}")


@dataclass(frozen=True)
class Refused:
    """A model type that `deep_insert` refuses; `reason` is a part of the error's message."""

    name: str
    build: Callable[[], PreTrainedModel]
    reason: str

    def model(self) -> PreTrainedModel:
        """Build the model, or skip the test if this version of transformers lacks it."""
        with skipping_what_is_missing():
            return self.build()


def _pad(sequences: list[list[int]], padding: str) -> dict[str, Tensor]:
    """Return the ids and the attention mask (B, S) of sequences padded on the side `padding`."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), None) if padding == "left" else slice(0, len(sequence))
        ids[row, place] = torch.tensor(sequence)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def noise(seed: int, *shape: int) -> Tensor:
    """Return a random tensor, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flat(seeds: list[list[int]]) -> list[int]:
    """Return the seeds of all images of the batch, in order."""
    return [seed for row in seeds for seed in row]


def token_types(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add token types: 1 for image tokens, 0 for others. Some families need it as `finish`."""
    return inputs | {"mm_token_type_ids": (inputs["input_ids"] == PLACEHOLDER).long()}


def forget_the_last_batch(model: Any) -> None:
    """Reset the rotary offsets: Qwen-VL models of 5.2 and 5.3 use them again for a batch without images."""
    for part in model.modules():
        if getattr(part, "rope_deltas", None) is not None:
            part.rope_deltas = None


def logits_of(model: Any, inputs: Mapping[str, Tensor], **options: Any) -> Tensor:
    """Return the logits (B, S, V) of one forward without gradients."""
    if not options:
        forget_the_last_batch(model)
    with torch.no_grad():
        return model(**inputs, **options).logits


def skip_where_stock_differs(
    model: Any, inputs: Mapping[str, Tensor], other: dict[str, Any], **options: Any
) -> None:
    """Skip the test if the stock model fails, or generates other tokens with the options `other`.

    Up to 5.22, images are lost if a prompt is computed in chunks; up to 5.16, beams of some models fail.
    """
    tokens = []
    try:
        for each in ({}, other):
            torch.manual_seed(7)
            with insert_at(model, 0), torch.no_grad():
                tokens.append(model.generate(**inputs, **options, **each))
    except Exception as error:
        skip_here(f"the stock model fails with {other} or without: {_in_a_line(error)}")
    if not torch.equal(*tokens):
        skip_here(f"the stock model generates other tokens with {other}")


def assert_close(logits: Tensor, expected: Tensor) -> None:
    """Check that logits are equal up to rounding in float32: to 5e-5 of the largest one."""
    largest = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(logits, expected, atol=5e-5 * largest, rtol=2e-5)
