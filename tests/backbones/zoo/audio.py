"""Audio and omni models with encoders of their own kind: conformers with a Q-Former, tokenizers, Phi-4."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from .family import PLACEHOLDER, TEXT, VISION, Family, Media, flat, noise

MELS = 8


def _granite(config_class: Any, model_class: type[PreTrainedModel], **encoder: Any) -> PreTrainedModel:
    concatenated = 1 + len(encoder.get("cat_hidden_layers", []))
    projector = {
        "model_type": "blip_2_qformer",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "encoder_hidden_size": 32 * concatenated,
    }
    conformer = {
        "input_dim": MELS,
        "num_layers": 2,
        "hidden_dim": 32,
        "num_heads": 4,
        "context_size": 4,
        "max_pos_emb": 8,
        "output_dim": 6,
        "conv_kernel_size": 3,
    }
    # Multipliers other than 1, as in the released models: Granite scales embeddings, residuals and logits.
    multipliers = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}
    return model_class(
        config_class(
            text_config={"model_type": "granite", **multipliers, **TEXT},
            encoder_config=conformer | encoder,
            projector_config=projector,
            audio_token_index=PLACEHOLDER,
            has_lora_adapter=False,
            window_size=4,
            downsample_rate=2,
        )
    )


def _granite_speech() -> PreTrainedModel:
    return _granite(hf.GraniteSpeechConfig, hf.GraniteSpeechForConditionalGeneration)


def _granite_speech_plus() -> PreTrainedModel:
    return _granite(
        hf.GraniteSpeechPlusConfig, hf.GraniteSpeechPlusForConditionalGeneration, cat_hidden_layers=[1]
    )


def _vibevoice_asr() -> PreTrainedModel:
    def tokenizer(width: int) -> dict[str, Any]:
        return {
            "model_type": "vibevoice_acoustic_tokenizer_encoder",
            "hidden_size": width,
            "kernel_size": 3,
            "num_filters": 4,
            "downsampling_ratios": [2, 2],
            "depths": [1, 1, 1],
            "vae_std": 0.0,
        }

    return hf.VibeVoiceAsrForConditionalGeneration(
        hf.VibeVoiceAsrConfig(
            text_config={"model_type": "qwen2", **TEXT},
            acoustic_tokenizer_encoder_config=tokenizer(16),
            semantic_tokenizer_encoder_config=tokenizer(24),
            audio_token_id=PLACEHOLDER,
            audio_bos_token_id=PLACEHOLDER + 1,
            audio_eos_token_id=PLACEHOLDER + 2,
            # Longer sounds are encoded piece by piece.
            acoustic_tokenizer_chunk_size=12,
        )
    )


def _nemo_speechlm() -> PreTrainedModel:
    """Nemotron-H with layers of three kinds: Mamba, experts, attention."""
    text = {
        "model_type": "nemotron_h",
        "layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention"],
        "head_dim": 8,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    }
    text |= {key: TEXT[key] for key in TEXT if key != "num_hidden_layers"}
    encoder = {
        "num_mel_bins": MELS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "subsampling_factor": 2,
    }
    diarization = {
        "audio_config": encoder,
        "head_config": {
            "hidden_size": 16,
            "num_speakers": 4,
            "audio_hidden_size": 32,
            "subsampling_factor": 2,
        },
        "streaming_config": {"num_speakers": 4, "subsampling_factor": 2},
    }
    words = {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 8,
        "blank_token_id": 7,
    }
    return hf.Nemotron3_5TranscribeForConditionalGeneration(
        hf.Nemotron3_5TranscribeConfig(
            text_config=text,
            audio_config={"asr_config": encoder, "diarization_config": diarization},
            word_timestamp_config=words,
            audio_token_id=PLACEHOLDER,
        )
    )


def _phi4() -> PreTrainedModel:
    audio = hf.Phi4MultimodalAudioConfig(
        input_size=MELS,
        num_blocks=2,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=48,
        ext_pw_out_channel=32,
        depthwise_separable_out_channel=32,
        nemo_conv_channels=8,
        time_reduction=4,
        audio_token_id=PLACEHOLDER + 1,
    )
    vision = hf.Phi4MultimodalVisionConfig(
        **VISION | {"patch_size": 4}, crop_size=16, image_token_id=PLACEHOLDER
    )
    return hf.Phi4MultimodalForCausalLM(
        hf.Phi4MultimodalConfig(vision_config=vision, audio_config=audio, sliding_window=16, **TEXT)
    )


def _windowed(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Eight mel frames, two queries for each window of four: four tokens, or two by the mask."""
    counts = [4 - 2 * (seed % 2) for seed in flat(seeds)]
    features = torch.stack([noise(seed, 8, MELS) for seed in flat(seeds)])
    mask = torch.stack([torch.arange(4) < count for count in counts])
    inputs = {"input_features": features, "input_features_mask": mask}
    return Media(inputs, [[PLACEHOLDER] * count for count in counts])


def _halved(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Two mel frames per token, so four tokens or three."""
    frames = [8 - 2 * (seed % 2) for seed in flat(seeds)]
    features = torch.stack([noise(seed, 8, MELS) for seed in flat(seeds)])
    mask = torch.stack([(torch.arange(8) < count).long() for count in frames])
    inputs = {"input_features": features, "input_features_mask": mask}
    return Media(inputs, [[PLACEHOLDER] * (count // 2) for count in frames])


def _waves(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Four samples per token, padded to full tokens: five tokens or four, between marks of begin and end."""
    samples = [20 - 6 * (seed % 2) for seed in flat(seeds)]
    mask = torch.stack([torch.arange(20) < count for count in samples])
    values = torch.stack([noise(seed, 1, 20) for seed in flat(seeds)]) * mask[:, None]
    inputs = {"input_values": values, "padding_mask": mask}
    begin, end = PLACEHOLDER + 1, PLACEHOLDER + 2
    return Media(inputs, [[begin, *[PLACEHOLDER] * -(-count // 4), end] for count in samples])


def _phi4_images(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """A tile or two of 4 x 4 patches beside the whole, 2 x 2 patches pooled, a feature after each row.

    There is always an empty tile: without one the stock encoder has no mask, and is causal under sdpa.
    """
    widths = [1 + seed % 2 for seed in flat(seeds)]
    pixels = torch.zeros(len(widths), 4, 3, 16, 16)
    mask = torch.zeros(len(widths), 4, 4, 4)
    for image, (seed, width) in enumerate(zip(flat(seeds), widths, strict=True)):
        pixels[image, : 1 + width] = noise(seed, 1 + width, 3, 16, 16)
        mask[image, : 1 + width] = 1
    inputs = {
        "image_pixel_values": pixels,
        "image_attention_mask": mask,
        "image_sizes": torch.tensor([[16, 16 * width] for width in widths]),
    }
    whole, divider = 2 * (2 + 1), 1
    return Media(inputs, [[PLACEHOLDER] * (2 * (2 * width + 1) + divider + whole) for width in widths])


def _phi4_sounds(model: PreTrainedModel, seeds: list[list[int]]) -> Media:
    """Four mel frames per token, so four tokens or three."""
    counts = [4 - seed % 2 for seed in flat(seeds)]
    inputs = {
        "audio_input_features": torch.stack([noise(seed, 16, MELS) for seed in flat(seeds)]),
        "audio_embed_sizes": torch.tensor(counts),
    }
    return Media(inputs, [[PLACEHOLDER + 1] * count for count in counts])


FAMILIES = [
    Family("granite_speech", _granite_speech, _windowed),
    Family("granite_speech_plus", _granite_speech_plus, _windowed),
    Family("nemo_speechlm", _nemo_speechlm, _halved),
    Family("vibevoice_asr", _vibevoice_asr, _waves),
    Family("phi4_multimodal", _phi4, _phi4_images),
    Family("phi4_multimodal-audio", _phi4, _phi4_sounds, placeholders=frozenset({PLACEHOLDER + 1})),
]
