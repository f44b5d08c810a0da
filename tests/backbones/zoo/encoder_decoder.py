"""Encoder-decoders. Where images are rows of the encoder, they can wait there; else they are refused."""

from __future__ import annotations

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from .family import PLACEHOLDER, TEXT, VISION, WORDS, Family, Media, Refused, flat, noise
from .llava_like import square_images

VOCABULARY = TEXT["vocab_size"]
T5 = {"vocab_size": VOCABULARY, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


def _pix2struct() -> PreTrainedModel:
    vision = {
        "hidden_size": 32,
        "patch_embed_hidden_size": 48,
        "d_kv": 8,
        "d_ff": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "seq_len": 8,
    }
    return hf.Pix2StructForConditionalGeneration(
        hf.Pix2StructConfig(text_config={"hidden_size": 32, **T5}, vision_config=vision)
    )


def _udop() -> PreTrainedModel:
    return hf.UdopForConditionalGeneration(hf.UdopConfig(d_model=32, image_size=16, patch_size=8, **T5))


def _pp_formulanet() -> PreTrainedModel:
    text = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
    }
    vision = {
        "hidden_size": 32,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 64,
        "window_size": 2,
        "global_attn_indexes": [1],
        "mlp_dim": 48,
        "post_conv_in_channels": 16,
        "post_conv_mid_channels": 16,
        "post_conv_out_channels": 16,
        "decoder_hidden_size": 32,
    }
    return hf.PPFormulaNetForConditionalGeneration(
        hf.PPFormulaNetConfig(text_config=text, vision_config=vision)
    )


def _t5gemma2() -> PreTrainedModel:
    text = {key: TEXT[key] for key in TEXT if key not in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text |= {
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 8,
    }
    encoder = {
        "text_config": text,
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        "image_token_index": PLACEHOLDER,
        "mm_tokens_per_image": 4,
    }
    decoder = text | {"num_hidden_layers": 2, "layer_types": text["layer_types"][:2]}
    model = hf.T5Gemma2ForConditionalGeneration(
        hf.T5Gemma2Config(encoder=encoder, decoder=decoder, image_token_index=PLACEHOLDER)
    )
    # Zeros in a model from its configuration, with which all images are the same.
    projector = model.get_encoder().multi_modal_projector
    torch.nn.init.normal_(projector.mm_input_projection_weight, std=0.02)
    return model


def _vision_encoder_decoder() -> PreTrainedModel:
    text = hf.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        is_decoder=True,
        add_cross_attention=True,
    )
    return hf.VisionEncoderDecoderModel(
        hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**VISION), text)
    )


def _florence2() -> PreTrainedModel:
    text = {
        "model_type": "bart",
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "encoder_layers": 4,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 128,
        "pad_token_id": TEXT["pad_token_id"],
        "bos_token_id": TEXT["bos_token_id"],
        "eos_token_id": TEXT["eos_token_id"],
        "forced_eos_token_id": None,
    }
    vision = {
        "depths": [1, 1, 1, 1],
        "embed_dim": [8, 8, 16, 16],
        "num_heads": [2, 2, 2, 2],
        "num_groups": [2, 2, 2, 2],
        "projection_dim": 32,
        "window_size": 4,
        "patch_stride": [2, 2, 2, 2],
    }
    return hf.Florence2ForConditionalGeneration(
        hf.Florence2Config(text_config=text, vision_config=vision, image_token_id=PLACEHOLDER)
    )


def _florence2_images(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Images of 32 x 32 pixels: 2 x 2 cells and their mean, five tokens."""
    images = [noise(seed, 3, 32, 32) for seed in flat(seeds)]
    return Media({"pixel_values": torch.stack(images)}, [[PLACEHOLDER] * 5 for _ in images])


def _with_decoder(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The decoder reads as many words as the encoder has rows: an output for each of them."""
    ids = inputs["input_ids"]
    return inputs | {"decoder_input_ids": torch.where(ids == PLACEHOLDER, WORDS.start, ids)}


ENCODER_CACHE = {"short_cache": "the encoder keeps no keys; the decoder's cache is the stock model's"}
REMARK = "The layers are the encoder's; the decoder reads all rows of its output."
FAMILIES = [
    Family(
        "florence2",
        _florence2,
        _florence2_images,
        finish=_with_decoder,
        pads_right="the encoder's learned positions count padding",
        without=ENCODER_CACHE,
        remark=REMARK,
    ),
    Family(
        "t5gemma2",
        _t5gemma2,
        square_images,
        finish=_with_decoder,
        pads_right="the decoder's input is padded as the encoder's, and its positions count padding",
        without=ENCODER_CACHE,
        remark=REMARK,
    ),
]

REFUSED = [
    Refused("pix2struct", _pix2struct, "encoder-decoder"),
    Refused("pp_formulanet", _pp_formulanet, "encoder-decoder"),
    Refused("udop", _udop, "encoder-decoder"),
    Refused("vision-encoder-decoder", _vision_encoder_decoder, "encoder-decoder"),
]
