"""The Granite families: features that are added between the decoder's first layers."""

from __future__ import annotations

import torch
import transformers as hf
from transformers import PreTrainedModel

from .family import PLACEHOLDER, TEXT, VISION, Family, Media, flat, noise
from .idefics_like import AROUND, listed, tiles_of

ADDED = "What is added to a waiting row between the layers below stays on it."

PLAIN = {
    "embedding_multiplier": 2.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 0.35,
}
"""Less of what would hide a wrong row in the logits."""


def _granite_docling() -> PreTrainedModel:
    return hf.GraniteDoclingForConditionalGeneration(
        hf.GraniteDoclingConfig(
            text_config={**TEXT, **PLAIN},
            vision_config={
                **VISION,
                "patch_size": 4,
                "scale_factor": 2,
                "out_hidden_size": 32,
                "deepstack_visual_indexes": [0, 1],
            },
            image_token_id=PLACEHOLDER,
            pad_token_id=TEXT["pad_token_id"],
        )
    )


def _granite4_vision() -> PreTrainedModel:
    return hf.Granite4VisionForConditionalGeneration(
        hf.Granite4VisionConfig(
            text_config={**TEXT, **PLAIN},
            vision_config={
                "model_type": "siglip_vision_model",
                "vision_use_head": False,
                **VISION,
                "hidden_size": 64,
                "patch_size": 4,
            },
            qformer_config={
                "model_type": "blip_2_qformer",
                "num_hidden_layers": 1,
                "intermediate_size": 48,
                "cross_attention_frequency": 1,
                "use_qformer_text_input": False,
            },
            image_token_index=PLACEHOLDER,
            vision_feature_select_strategy="full",
            image_grid_pinpoints=[[16, 16], [16, 32]],
            downsample_rate="2/4",
            deepstack_layer_map=[[1, 0], [2, 1]],
            spatial_target_layers=[2, 3],
            projector_dropout=0.0,
        )
    )


def _split_images(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of one or two tiles of 16 x 16 pixels, four tokens per tile, each between two others."""
    tiles = tiles_of(seeds)
    most = max(map(len, tiles))
    mask = torch.tensor([[place < len(own) for place in range(most)] for own in tiles])
    tokens = [([AROUND] + [PLACEHOLDER] * 4) * (1 + seed % 2) + [AROUND] for seed in flat(seeds)]
    return Media({"pixel_values": listed(tiles), "pixel_attention_mask": mask}, tokens)


def _tiled_images(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of one or two tiles and the whole, with a newline feature after each row."""
    wide = [16 + 16 * (seed % 2) for seed in flat(seeds)]
    inputs = {
        "pixel_values": torch.stack([noise(seed, 3, 3, 16, 16) for seed in flat(seeds)]),
        "image_sizes": torch.tensor([[16, width] for width in wide]),
    }
    return Media(inputs, [[PLACEHOLDER] * (4 + 2 * (width // 8 + 1)) for width in wide])


FAMILIES = [
    Family("granite_docling", _granite_docling, _split_images, remark=ADDED),
    Family(
        "granite4_vision",
        _granite4_vision,
        _tiled_images,
        without={"short_cache": "the stock model makes no cache of its own, outside of generation"},
        remark=ADDED,
    ),
]
