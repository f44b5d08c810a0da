"""Encoder-decoders: what an image becomes are rows of the encoder, or the encoder itself; refused."""

from __future__ import annotations

from transformers import (
    BertConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Pix2StructConfig,
    Pix2StructForConditionalGeneration,
    PPFormulaNetConfig,
    PPFormulaNetForConditionalGeneration,
    PreTrainedModel,
    T5Gemma2Config,
    T5Gemma2ForConditionalGeneration,
    UdopConfig,
    UdopForConditionalGeneration,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from .family import PLACEHOLDER, TEXT, VISION, Refused

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
    return Pix2StructForConditionalGeneration(
        Pix2StructConfig(text_config={"hidden_size": 32, **T5}, vision_config=vision)
    )


def _udop() -> PreTrainedModel:
    return UdopForConditionalGeneration(UdopConfig(d_model=32, image_size=16, patch_size=8, **T5))


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
    return PPFormulaNetForConditionalGeneration(PPFormulaNetConfig(text_config=text, vision_config=vision))


def _t5gemma2() -> PreTrainedModel:
    text = {key: TEXT[key] for key in TEXT if key not in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text |= {"head_dim": 8}
    encoder = {
        "text_config": text,
        "vision_config": VISION,
        "image_token_index": PLACEHOLDER,
        "mm_tokens_per_image": 4,
    }
    return T5Gemma2ForConditionalGeneration(
        T5Gemma2Config(encoder=encoder, decoder=text, image_token_index=PLACEHOLDER)
    )


def _vision_encoder_decoder() -> PreTrainedModel:
    text = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        is_decoder=True,
        add_cross_attention=True,
    )
    return VisionEncoderDecoderModel(
        VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), text)
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
    }
    vision = {
        "depths": [1, 1, 1, 1],
        "embed_dim": [8, 8, 16, 16],
        "num_heads": [2, 2, 2, 2],
        "num_groups": [2, 2, 2, 2],
        "projection_dim": 32,
        "window_size": 4,
    }
    return Florence2ForConditionalGeneration(
        Florence2Config(text_config=text, vision_config=vision, image_token_id=PLACEHOLDER)
    )


REFUSED = [
    Refused("florence2", _florence2, "encoder-decoder"),
    Refused("pix2struct", _pix2struct, "encoder-decoder"),
    Refused("pp_formulanet", _pp_formulanet, "encoder-decoder"),
    Refused("t5gemma2", _t5gemma2, "encoder-decoder"),
    Refused("udop", _udop, "encoder-decoder"),
    Refused("vision-encoder-decoder", _vision_encoder_decoder, "encoder-decoder"),
]
