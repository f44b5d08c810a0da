"""Models whose features are no rows of the decoder that could wait: refused.

They are read by cross-attention, added to the text, put in front of it, or read by a second decoder.
"""

from __future__ import annotations

import transformers as hf
from transformers import PreTrainedModel

from .family import PLACEHOLDER, TEXT, VISION, Refused

SMALL = {
    "vocab_size": TEXT["vocab_size"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def _blip() -> PreTrainedModel:
    text = SMALL | {"encoder_hidden_size": 32, "projection_dim": 16, "max_position_embeddings": 64}
    return hf.BlipForConditionalGeneration(
        hf.BlipConfig(text_config=text, vision_config=VISION, projection_dim=16)
    )


def _idefics() -> PreTrainedModel:
    vision = {key: VISION[key] for key in VISION if key != "hidden_size"}
    return hf.IdeficsForVisionText2Text(hf.IdeficsConfig(vision_config={"embed_dim": 32, **vision}, **SMALL))


def _mllama() -> PreTrainedModel:
    rotary = {"rope_type": "default", "rope_theta": 1e4}
    vision = {
        "hidden_size": 32,
        "image_size": 16,
        "patch_size": 8,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 4,
        "intermediate_size": 32,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
    }
    text = {**TEXT, "cross_attention_layers": [1], "rope_parameters": rotary}
    return hf.MllamaForConditionalGeneration(hf.MllamaConfig(text_config=text, vision_config=vision))


def _evolla() -> PreTrainedModel:
    return hf.EvollaForProteinText2Text(
        hf.EvollaConfig(
            protein_encoder_config=SMALL,
            aligner_num_add_layers=1,
            resampler_depth=1,
            resampler_heads=2,
            resampler_dim_head=8,
            resampler_num_latents=2,
            num_key_value_heads=2,
            **SMALL,
        )
    )


def _git() -> PreTrainedModel:
    return hf.GitForCausalLM(hf.GitConfig(vision_config=VISION, **SMALL))


def _pi0() -> PreTrainedModel:
    text = {"model_type": "gemma", "head_dim": 8, **TEXT}
    language_and_vision = {
        "model_type": "paligemma",
        "text_config": text,
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        "projection_dim": 32,
        "image_token_id": PLACEHOLDER,
    }
    return hf.PI0ForConditionalGeneration(
        hf.PI0Config(vlm_config=language_and_vision, dit_config=text, max_state_dim=4, max_action_dim=4)
    )


def _voxtral_realtime() -> PreTrainedModel:
    audio = {"num_mel_bins": 8, "head_dim": 8} | {key: SMALL[key] for key in SMALL if key != "vocab_size"}
    return hf.VoxtralRealtimeForConditionalGeneration(
        hf.VoxtralRealtimeConfig(
            text_config={"model_type": "voxtral_realtime_text", "head_dim": 8, **TEXT},
            audio_config={"model_type": "voxtral_realtime_encoder", **audio},
        )
    )


def _kyutai_speech_to_text() -> PreTrainedModel:
    codec = {
        "model_type": "mimi",
        "num_filters": 4,
        "hidden_size": 16,
        "codebook_dim": 16,
        "vector_quantization_hidden_dimension": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 16,
        "codebook_size": 8,
        "num_quantizers": 2,
        "upsample_groups": 16,
    }
    return hf.KyutaiSpeechToTextForConditionalGeneration(
        hf.KyutaiSpeechToTextConfig(
            vocab_size=TEXT["vocab_size"],
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_codebooks=2,
            codebook_vocab_size=9,
            audio_bos_token_id=8,
            audio_pad_token_id=70,
            bos_token_id=1,
            codec_config=codec,
        )
    )


REFUSED = [
    Refused("blip", _blip, "no list of decoder layers"),
    Refused("evolla", _evolla, "cross-attention"),
    Refused("git", _git, "no list of decoder layers"),
    Refused("idefics", _idefics, "cross-attention"),
    Refused("kyutai_speech_to_text", _kyutai_speech_to_text, "no placeholder tokens"),
    Refused("mllama", _mllama, "cross-attention"),
    Refused("pi0", _pi0, "no list of decoder layers"),
    Refused("voxtral_realtime", _voxtral_realtime, "no placeholder tokens"),
]
