"""Small processors of real families: their image processors and templates, with tokenizers trained here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
)

from deepinsert.backbones.compat.transformers import pil_image_processor

TINY = Path(__file__).parents[1] / "backbones" / "tiny"

# Templates of the published checkpoints: LLaVA-1.5 writes no end token, LLaVA-NeXT (Mistral) misspells it.
IMAGES = "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
TEXTS = "{% for part in message['content'] if part['type'] == 'text' %}"
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}"
    "{% endif %}" + IMAGES + TEXTS + "{{ part['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
NEXT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    + IMAGES
    + TEXTS
    + "{{ part['text'] }}{% endfor %}{{' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'][0]['text'] + '<\\\\s> '}}{% endif %}{% endfor %}"
)
ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    + IMAGES
    + TEXTS
    + "{{ '\n' + part['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SPECIAL = ["<s>", "</s>", "<image>", "<video>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"]
SPECIAL += ["<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|endoftext|>"]
CORPUS = [
    "USER: What colour is the cat? ASSISTANT: It is black. ",
    "user assistant [INST] Red and yellow [/INST]",
]


def byte_level_tokenizer(eos: str, *, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer like those of Qwen2 and GPT-2, in which a space belongs to the next word."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, pad_token="<|endoftext|>")


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama's, with "▁" before words, a beginning-of-text token and no pad token."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<unk>", *SPECIAL, *byte_tokens], show_progress=False
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


class OnevisionWithoutVideo(LlavaOnevisionProcessor):
    """The stock processor without its video processor, which needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


class QwenWithoutVideo(Qwen2_5_VLProcessor):
    """The stock processor without its video processor, which needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def llava() -> Any:
    images = pil_image_processor("clip", "CLIP")(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    return LlavaProcessor(
        images,
        metaspace_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )


def llava_next() -> Any:
    images = pil_image_processor("llava_next", "LlavaNext")(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    return LlavaNextProcessor(
        images,
        metaspace_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=NEXT_TEMPLATE,
    )


def onevision() -> Any:
    images = pil_image_processor("llava_onevision", "LlavaOnevision")(
        size={"height": 28, "width": 28}, image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]]
    )
    return OnevisionWithoutVideo(
        images,
        byte_level_tokenizer("<|im_end|>", trim_offsets=True),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION_TEMPLATE,
    )


def qwen() -> Any:
    images = pil_image_processor("qwen2_vl", "Qwen2VL")(min_pixels=28 * 28, max_pixels=56 * 56)
    return QwenWithoutVideo(images, byte_level_tokenizer("<|im_end|>"), chat_template=QWEN_TEMPLATE)


def tiny() -> Any:
    return AutoProcessor.from_pretrained(TINY)


PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": llava,
    "llava_next": llava_next,
    "onevision": onevision,
    "qwen2_5_vl": qwen,
    "tiny": tiny,
}
