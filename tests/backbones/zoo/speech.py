"""Speech and music models: mel frames through a Whisper-like encoder, a projector, a decoder."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from .family import PLACEHOLDER, TEXT, Family, Media, flat, noise

MELS = 8
FRAMES = 32
ENCODER: dict[str, Any] = {
    "num_mel_bins": MELS,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
WHISPER = ENCODER | {"max_source_positions": FRAMES // 2}


def _audioflamingo3() -> PreTrainedModel:
    return hf.AudioFlamingo3ForConditionalGeneration(
        hf.AudioFlamingo3Config(
            text_config={"model_type": "qwen2", **TEXT},
            audio_config={"model_type": "audioflamingo3_encoder", **WHISPER},
            audio_token_id=PLACEHOLDER,
        )
    )


def _musicflamingo() -> PreTrainedModel:
    return hf.MusicFlamingoForConditionalGeneration(
        hf.MusicFlamingoConfig(
            text_config={"model_type": "qwen2", **TEXT},
            audio_config={"model_type": "audioflamingo3_encoder", **WHISPER},
            audio_token_id=PLACEHOLDER,
            audio_bos_token_id=PLACEHOLDER + 1,
            audio_eos_token_id=PLACEHOLDER + 2,
        )
    )


def _voxtral() -> PreTrainedModel:
    return hf.VoxtralForConditionalGeneration(
        hf.VoxtralConfig(
            text_config={"model_type": "llama", "head_dim": 8, **TEXT},
            audio_config={"model_type": "voxtral_encoder", **WHISPER},
            audio_token_id=PLACEHOLDER,
        )
    )


def _glmasr() -> PreTrainedModel:
    return hf.GlmAsrForConditionalGeneration(
        hf.GlmAsrConfig(
            text_config={"model_type": "llama", **TEXT},
            audio_config={"model_type": "glmasr_encoder", **ENCODER},
            audio_token_id=PLACEHOLDER,
        )
    )


def _moss() -> PreTrainedModel:
    return hf.MossTranscribeDiarizeForConditionalGeneration(
        hf.MossTranscribeDiarizeConfig(
            text_config={"model_type": "qwen3", "head_dim": 8, **TEXT},
            audio_config=WHISPER,
            audio_token_id=PLACEHOLDER,
        )
    )


def _fun_asr_nano() -> PreTrainedModel:
    adaptor = {
        "hidden_size": 32,
        "intermediate_size": 8,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "projector_hidden_size": 48,
    }
    return hf.FunAsrNanoForConditionalGeneration(
        hf.FunAsrNanoConfig(
            text_config={"model_type": "qwen3", "head_dim": 8, **TEXT},
            audio_config={
                "model_type": "fun_asr_nano_encoder",
                **ENCODER,
                "num_stacked_frames": 2,
                "num_timestamp_prediction_layers": 1,
                "fsmn_kernel_size": 3,
            },
            adaptor_config=adaptor,
            audio_token_id=PLACEHOLDER,
        )
    )


def _qwen3_asr() -> PreTrainedModel:
    return hf.Qwen3ASRForConditionalGeneration(
        hf.Qwen3ASRConfig(
            text_config={"model_type": "qwen3", "head_dim": 8, **TEXT},
            audio_config={
                "model_type": "qwen3_asr_encoder",
                "num_mel_bins": MELS,
                "d_model": 32,
                "encoder_layers": 2,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 48,
                "output_dim": 32,
                "n_window_infer": 100,
                "downsample_hidden_size": 4,
            },
            audio_token_id=PLACEHOLDER,
            timestamp_token_id=PLACEHOLDER + 1,
            pad_token_id=TEXT["pad_token_id"],
        )
    )


def _mel_frames(
    seeds: list[list[int]], total: int, shorter: int
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Features (sounds, mels, total), their mask and lengths: `total` or `shorter` frames by the seed."""
    frames = [shorter if seed % 2 else total for seed in flat(seeds)]
    mask = torch.stack([(torch.arange(total) < count).long() for count in frames])
    return torch.stack([noise(seed, MELS, total) for seed in flat(seeds)]), mask, frames


def _pooled(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Four frames a token: eight tokens or five."""
    features, mask, frames = _mel_frames(seeds, FRAMES, 20)
    inputs = {"input_features": features, "input_features_mask": mask}
    return Media(inputs, [[PLACEHOLDER] * (count // 4) for count in frames])


def _merged(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Eight frames a token: four tokens or two, a rest dropped."""
    features, mask, frames = _mel_frames(seeds, FRAMES, 20)
    inputs = {"input_features": features, "input_features_mask": mask}
    return Media(inputs, [[PLACEHOLDER] * (count // 8) for count in frames])


def _merged_with_rest(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Eight frames a token, a rest filled up: four tokens or three. The mask of raw samples is 10 a frame."""
    features, mask, frames = _mel_frames(seeds, FRAMES, 20)
    inputs = {
        "input_features": features,
        "input_features_mask": mask,
        "padding_mask": mask.repeat_interleave(10, dim=1),
    }
    return Media(inputs, [[PLACEHOLDER] * -(-count // 8) for count in frames])


def _whole(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Windows of one length, four tokens each; Voxtral takes no mask."""
    features, _, frames = _mel_frames(seeds, FRAMES, FRAMES)
    return Media({"input_features": features}, [[PLACEHOLDER] * 4 for _ in frames])


def _stacked(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Two mel frames stacked in a row of features, one token each: six tokens.

    No shorter sound among longer ones: the stock adaptor's attention has no name unless one was set, and then
    adds its padding mask of True and False to the scores, so that sdpa and eager are different models.
    """
    features = torch.stack([noise(seed, 6, 2 * MELS) for seed in flat(seeds)])
    inputs = {"input_features": features, "input_features_mask": torch.ones(len(features), 6).long()}
    return Media(inputs, [[PLACEHOLDER] * 6 for _ in features])


def _convolved(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Chunks of 100 frames, thirteen tokens; 60 frames are eight."""
    features, mask, frames = _mel_frames(seeds, 100, 60)
    inputs = {"input_features": features, "input_features_mask": mask}
    return Media(inputs, [[PLACEHOLDER] * (13 if count == 100 else 8) for count in frames])


FAMILIES = [
    Family("audioflamingo3", _audioflamingo3, _pooled),
    Family("musicflamingo", _musicflamingo, _pooled),
    Family("voxtral", _voxtral, _whole),
    Family("glmasr", _glmasr, _merged),
    Family("moss_transcribe_diarize", _moss, _merged_with_rest),
    Family("fun_asr_nano", _fun_asr_nano, _stacked),
    Family("qwen3_asr", _qwen3_asr, _convolved),
]
