"""Models that squeeze an image into a few query tokens: BLIP-2, InstructBLIP, Kosmos-2."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from .family import PAD, PLACEHOLDER, TEXT, VISION, WORDS, Family, Media, Refused, flat, noise

QUERIES = 3
OPT: dict[str, Any] = {
    "model_type": "opt",
    "vocab_size": TEXT["vocab_size"],
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": TEXT["num_hidden_layers"],
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5: dict[str, Any] = {
    "model_type": "t5",
    "vocab_size": TEXT["vocab_size"],
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
QFORMER: dict[str, Any] = {
    "vocab_size": TEXT["vocab_size"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
WITH_IMAGES = ((3, 0, 4), (1, 0), (2, 0, 3, 0, 2), (0, 6))
"""The forward needs pixel values, so every row has an image."""

PADDING_COUNTED = (
    "with a cache the stock model counts padding in the positions of new tokens, without it does not"
)


def _blip2(text: dict[str, Any]) -> PreTrainedModel:
    return hf.Blip2ForConditionalGeneration(
        hf.Blip2Config(
            text_config=text,
            vision_config=VISION,
            qformer_config=QFORMER,
            num_query_tokens=QUERIES,
            image_text_hidden_size=16,
            image_token_index=PLACEHOLDER,
        )
    )


def _blip2_opt() -> PreTrainedModel:
    return _blip2(OPT)


def _instructblip(text: dict[str, Any]) -> PreTrainedModel:
    return hf.InstructBlipForConditionalGeneration(
        hf.InstructBlipConfig(
            text_config=text,
            vision_config=VISION,
            qformer_config=QFORMER,
            num_query_tokens=QUERIES,
            image_token_index=PLACEHOLDER,
        )
    )


def _instructblip_llama() -> PreTrainedModel:
    return _instructblip({"model_type": "llama", **TEXT})


def _instructblipvideo() -> PreTrainedModel:
    return hf.InstructBlipVideoForConditionalGeneration(
        hf.InstructBlipVideoConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config=VISION,
            qformer_config=QFORMER,
            num_query_tokens=QUERIES,
            video_token_index=PLACEHOLDER,
        )
    )


KOSMOS_TEXT: dict[str, Any] = {
    "vocab_size": TEXT["vocab_size"],
    "max_position_embeddings": 128,
    "embed_dim": 32,
    "layers": TEXT["num_hidden_layers"],
    "ffn_dim": 48,
    "attention_heads": 4,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _kosmos2() -> PreTrainedModel:
    return hf.Kosmos2ForConditionalGeneration(
        hf.Kosmos2Config(text_config=KOSMOS_TEXT, vision_config=VISION, latent_query_num=QUERIES)
    )


def _kosmos2_5() -> PreTrainedModel:
    vision = {
        "hidden_size": 32,
        "patch_embed_hidden_size": 48,
        "intermediate_size": 48,
        "head_dim": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_num_patches": 16,
    }
    return hf.Kosmos2_5ForConditionalGeneration(
        hf.Kosmos2_5Config(text_config=KOSMOS_TEXT, vision_config=vision, latent_query_num=QUERIES)
    )


def _queried(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Square images, three query tokens each."""
    images = [noise(seed, 3, 16, 16) for seed in flat(seeds)]
    return Media({"pixel_values": torch.stack(images)}, [[PLACEHOLDER] * QUERIES for _ in images])


def _instruction(seeds: list[list[int]]) -> dict[str, Tensor]:
    """The instruction that the Q-Former reads beside each image: four words or two."""
    chosen = [torch.Generator().manual_seed(seed) for seed in flat(seeds)]
    ids = [torch.randint(WORDS.start, WORDS.stop, (4,), generator=generator) for generator in chosen]
    mask = torch.stack([(torch.arange(4) < 4 - 2 * (seed % 2)).long() for seed in flat(seeds)])
    return {"qformer_input_ids": torch.stack(ids) * mask, "qformer_attention_mask": mask}


def _instructed(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    media = _queried(model, seeds)
    return Media(media.inputs | _instruction(seeds), media.tokens)


def _instructed_videos(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Videos of two frames, three query tokens per frame."""
    videos = [noise(seed, 2, 3, 16, 16) for seed in flat(seeds)]
    inputs = {"pixel_values": torch.stack(videos)} | _instruction(seeds)
    return Media(inputs, [[PLACEHOLDER] * (2 * QUERIES) for _ in videos])


def _patches(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of eight or six patches, each its row and column and 48 values; three query tokens each."""
    images = []
    for seed in flat(seeds):
        cells = torch.tensor([[row, column] for row in (1, 2) for column in (1, 2, 3, 4)]).float()
        patches = torch.cat([cells, noise(seed, 8, 48)], dim=1)
        images.append(patches * (torch.arange(8) < 8 - 2 * (seed % 2))[:, None])
    return Media({"flattened_patches": torch.stack(images)}, [[PLACEHOLDER] * QUERIES for _ in images])


def _position_mask(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Kosmos-2 has no placeholder token; its processor passes the positions as a mask."""
    return inputs | {"image_embeds_position_mask": (inputs["input_ids"] == PLACEHOLDER).long()}


FAMILIES = [
    Family("blip-2", _blip2_opt, _queried, rows=WITH_IMAGES),
    Family("instructblip", _instructblip_llama, _instructed, rows=WITH_IMAGES),
    Family("instructblipvideo", _instructblipvideo, _instructed_videos, rows=WITH_IMAGES),
    Family(
        "kosmos-2",
        _kosmos2,
        _queried,
        finish=_position_mask,
        rows=WITH_IMAGES,
        generates_alone=PADDING_COUNTED,
    ),
    Family(
        "kosmos-2.5",
        _kosmos2_5,
        _patches,
        finish=_position_mask,
        rows=WITH_IMAGES,
        generates_alone=PADDING_COUNTED,
    ),
]

REFUSED = [
    Refused("blip-2 with T5", lambda: _blip2(T5), "encoder-decoder"),
    Refused("instructblip with T5", lambda: _instructblip(T5), "encoder-decoder"),
]
