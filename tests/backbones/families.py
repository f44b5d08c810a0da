"""Small models of real families, built from their configurations with random weights, and batches for them.

Each family says how to build its model and how one image or sound becomes model inputs; everything else,
padding and placing the placeholder tokens included, is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
)

LAYERS = 6
PLACEHOLDER = 5
PAD = 0
VOCABULARY = 60
FIRST_WORD = 10

Media = tuple[dict[str, Tensor], list[int]]
"""Model inputs of some images or sounds, and the number of multimodal tokens of each."""

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Family:
    """`media(model, n)` gives the inputs for n images or sounds and the number of tokens of each."""

    name: str
    build: Callable[[], PreTrainedModel]
    media: Callable[[PreTrainedModel, int, torch.Generator], Media]

    def model(self, seed: int = 0, attention: str = "sdpa") -> PreTrainedModel:
        torch.manual_seed(seed)
        model = self.build().eval()
        model.set_attn_implementation(attention)
        # Larger than the default initialisation, so that a wrong row shows in the logits.
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim >= 2:
                    weight.mul_(4)
        # Random weights may say the end token or a placeholder; generation tests want words, all of them.
        model.generation_config.eos_token_id = None
        model.generation_config.suppress_tokens = list(range(FIRST_WORD))
        return model

    def batch(
        self, model: PreTrainedModel, rows: Sequence[Sequence[int]], padding: str = "left", seed: int = 0
    ) -> dict[str, Tensor]:
        """Model inputs for rows such as (3, 0, 4, 0): 3 text tokens, an image, 4 text tokens, an image."""
        generator = torch.Generator().manual_seed(seed)
        inputs, sizes = self.media(model, sum(part == 0 for row in rows for part in row), generator)
        pending = iter(sizes)
        sequences = []
        for row in rows:
            ids: list[int] = []
            for part in row:
                if part == 0:
                    ids += [PLACEHOLDER] * next(pending)
                else:
                    ids += torch.randint(FIRST_WORD, VOCABULARY, (part,), generator=generator).tolist()
            sequences.append(ids)
        return self.pad(sequences, padding) | inputs

    def pad(self, sequences: list[list[int]], padding: str) -> dict[str, Tensor]:
        longest = max(map(len, sequences))
        ids = torch.full((len(sequences), longest), PAD)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            place = slice(longest - len(sequence), None) if padding == "left" else slice(0, len(sequence))
            ids[row, place] = torch.tensor(sequence)
            mask[row, place] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.name == "qwen2_5_vl":
            inputs["mm_token_type_ids"] = (ids == PLACEHOLDER).long()
        return inputs

    def alone(self, inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
        """Row `row` of a batch without its padding, with its own images or sounds."""
        keep = inputs["attention_mask"][row].bool()
        counts = [_media_count(self, ids, inputs) for ids in inputs["input_ids"]]
        first = sum(counts[:row])
        own = self.pad([inputs["input_ids"][row][keep].tolist()], "left")
        if counts[row]:
            own |= _media_slice(self, inputs, first, first + counts[row])
        return own


def _media_count(family: Family, ids: Tensor, inputs: dict[str, Tensor]) -> int:
    tokens = int((ids == PLACEHOLDER).sum())
    return tokens // TOKENS[family.name] if tokens else 0


def _media_slice(family: Family, inputs: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    own = {}
    for name, value in inputs.items():
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            continue
        per_item = 16 if name == "pixel_values" and family.name == "qwen2_5_vl" else 1
        own[name] = value[first * per_item : last * per_item]
    return own


def _llava() -> PreTrainedModel:
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
            image_token_id=PLACEHOLDER,
            image_seq_length=4,
        )
    )


def _llava_next() -> PreTrainedModel:
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            text_config={"model_type": "mistral", "sliding_window": None, **TEXT},
            vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
            image_token_id=PLACEHOLDER,
            image_grid_pinpoints=[[16, 32], [32, 16]],
        )
    )


def _llava_onevision() -> PreTrainedModel:
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            text_config={"model_type": "qwen2", **TEXT},
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
            image_token_id=PLACEHOLDER,
            video_token_id=PLACEHOLDER + 1,
            image_grid_pinpoints=[[16, 16], [16, 32]],
        )
    )


def _qwen2_5_vl() -> PreTrainedModel:
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                **TEXT,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [1, 1, 2],
                },
            },
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "patch_size": 4,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [1],
                "window_size": 16,
            },
            image_token_id=PLACEHOLDER,
            video_token_id=PLACEHOLDER + 1,
            vision_start_token_id=PLACEHOLDER + 2,
            vision_end_token_id=PLACEHOLDER + 3,
        )
    )


def _qwen2_audio() -> PreTrainedModel:
    return Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(
            text_config={"model_type": "qwen2", **TEXT},
            audio_config={
                "model_type": "qwen2_audio_encoder",
                "num_mel_bins": 8,
                "d_model": 32,
                "encoder_layers": 2,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 48,
                "max_source_positions": 16,
            },
            audio_token_id=PLACEHOLDER,
        )
    )


def _square_images(model: PreTrainedModel, count: int, generator: torch.Generator) -> Media:
    if not count:
        return {}, []
    return {"pixel_values": torch.randn(count, 3, 16, 16, generator=generator)}, [4] * count


def _tiled_images(model: PreTrainedModel, count: int, generator: torch.Generator) -> Media:
    if not count:
        return {}, []
    pixels = torch.randn(count, 3, 3, 16, 16, generator=generator)
    sizes = torch.tensor([[16, 32]] * count)
    return {"pixel_values": pixels, "image_sizes": sizes}, [TOKENS[model.config.model_type]] * count


def _patched_images(model: PreTrainedModel, count: int, generator: torch.Generator) -> Media:
    if not count:
        return {}, []
    pixels = torch.randn(count * 16, 3 * 2 * 4 * 4, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * count)}, [4] * count


def _sounds(model: PreTrainedModel, count: int, generator: torch.Generator) -> Media:
    if not count:
        return {}, []
    features = torch.randn(count, 8, 32, generator=generator)
    mask = torch.ones(count, 32, dtype=torch.long)
    return {"input_features": features, "feature_attention_mask": mask}, [TOKENS["qwen2_audio"]] * count


TOKENS: dict[str, int] = {
    "llava": 4,
    "llava_next": 14,
    "llava_onevision": 14,
    "qwen2_5_vl": 4,
    "qwen2_audio": 8,
}
"""Multimodal tokens of one image or sound."""

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llava", _llava, _square_images),
        Family("llava_next", _llava_next, _tiled_images),
        Family("llava_onevision", _llava_onevision, _tiled_images),
        Family("qwen2_5_vl", _qwen2_5_vl, _patched_images),
        Family("qwen2_audio", _qwen2_audio, _sounds),
    )
}


def logits_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(B, S, V) logits of one forward without gradients."""
    with torch.no_grad():
        return model(**inputs).logits
