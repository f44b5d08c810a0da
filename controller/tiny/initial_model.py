"""The tiny backbone before training: a stock LLaVA of a few million weights, its tokenizer and processor.

All classes are those of `transformers`, so the result is loaded, saved and used like any checkpoint of the
hub; only the sizes differ from LLaVA-1.5.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from deepinsert.backbones.compat.transformers import pil_image_processor
from deepinsert.envs.data.rendered_text import text_question
from deepinsert.envs.data.rendering import SIZE, SOURCES, draw_scene, questions

PATCH = 8
"""Side of a patch in pixels."""
IMAGE_TOKENS = (SIZE // PATCH) ** 2
IMAGE, PAD, END = "<image>", "<pad>", "</s>"

# LLaVA-1.5's form: "USER: <image>\nquestion ASSISTANT: answer</s>". As in its template, images come before
# the text; `generation` marks the assistant's tokens for trainers that mask everything else.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- 'ASSISTANT:' -}}
{%- generation -%}
{%- if message['content'] is string -%}
{{- ' ' + message['content'] -}}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- ' ' + part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '</s>' -}}
{%- endgeneration -%}
{%- else -%}
{{- message['role'].upper() + ': ' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- ' ' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

# Common words beside the rendered questions, so that the tokenizer encodes other questions in few tokens too.
GENERAL_TEXT = """
USER: ASSISTANT: SYSTEM: Answer the question using a single word or phrase. Answer with the option's letter.
the a an this that these those it its he she they we you I and or not no yes but if then than as of in on at
by to from for with without about into over under between near next behind before after above below left
right top bottom middle center corner side first last one two three four five six seven eight nine ten many
much more most less few all any some each every other another same different only also very too just now here
there when where which who whom whose what why how is are was were be been being am do does did done has have
had can could will would shall should may might must see seen look show shown find found say said tell ask
answer question image picture photo describe contain contains present color colour colors shape shapes object
objects thing things person people man woman child children boy girl dog cat bird horse car bus truck bicycle
road street house door window table chair tree flower water sky sun moon star hand head eye face food fruit
number numbers letter letters word words text sign name time day night year large small big little long short
tall high low old new young good bad hot cold open closed full empty light dark red green blue yellow teal
gray grey black brown white orange purple pink circle square rectangle triangle cross line dot round write
written draw drawn read digit option choose correct following please sound speech music voice molecule true
false kind type part place front back inside outside wear wearing hold holding sit sitting stand standing
walk walking run running play playing eat eating drink make made use used go going come take give get put
0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 A B C D E F
"""


def build_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on rendered questions and common words; any text encodes and decodes exactly.

    Each word of the questions is one token, so an answer has one to eight tokens.
    """
    rng = random.Random(seed)
    lines = [GENERAL_TEXT] * 3
    for number in range(1500):
        scene = draw_scene(SOURCES[number % len(SOURCES)], rng, "train")
        pairs = [(item.text, item.answer) for item in questions(scene, rng)] + [text_question(rng)[1:]]
        lines += [f"USER: {text} ASSISTANT: {answer}\n{text}" for text, answer in pairs]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1280,
        special_tokens=[PAD, END, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer_class: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = tokenizer_class(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    return wrapped


def build_processor(seed: int = 0) -> LlavaProcessor:
    """Build the processor: tokenizer, image processor (64 x 64 pixels in [-1, 1]) and chat template."""
    image_processor = pil_image_processor("clip", "CLIP")(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    processor_class: Any = LlavaProcessor
    processor: LlavaProcessor = processor_class(
        image_processor=image_processor,
        tokenizer=build_tokenizer(seed),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return processor


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlavaForConditionalGeneration:
    """Build a CLIP tower of 3 layers, a projector and a Llama of 8 layers, with random float32 weights.

    Widths are 128 everywhere.
    """
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.encode(IMAGE)[0],
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
