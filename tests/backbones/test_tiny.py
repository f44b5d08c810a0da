"""The tiny backbone is a complete, small stock model, and it uses its images."""

from __future__ import annotations

import json
import random

import pytest
import torch
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoProcessor, LlavaForConditionalGeneration

from deepinsert.backbones.loading import TINY
from deepinsert.controller.tiny.figures import TEXT_KINDS, measure_kinds
from deepinsert.envs.data.rendering import COLOURS, SHAPES, WORDS, draw_scene, questions, render

FIGURES = json.loads((TINY / "figures.json").read_text())
IMAGES = 120


@pytest.fixture(scope="module")
def accuracies(tiny_backbone):
    """Return the accuracy by kind with the image, at layers 0, 2 and 7, and with a grey image, at layer 0."""
    model, tokenizer = tiny_backbone.model, tiny_backbone.tokenizer
    with_image = measure_kinds(model, tokenizer, IMAGES, [0, 2, 7], seed=7)["accuracy"]
    blank = measure_kinds(model, tokenizer, IMAGES, [0], seed=7, blank=True)["accuracy"]
    return with_image, blank


def test_the_weights_are_stock_and_complete():
    model, report = AutoModelForMultimodalLM.from_pretrained(TINY, output_loading_info=True)
    assert type(model) is LlavaForConditionalGeneration
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    assert (TINY / "model.safetensors").stat().st_size <= 16 * 2**20


def test_it_reaches_the_figures_of_its_card(accuracies):
    with_image, blank = accuracies
    for kind, (accuracy, *_) in with_image.items():
        assert accuracy >= FIGURES["accuracy"][kind][0] - 0.08, kind
    reliable = [kind for kind in blank if kind not in TEXT_KINDS and with_image[kind][0] >= 0.9]
    assert len(reliable) >= 4
    assert all(with_image[kind][0] - blank[kind][0] >= 0.3 for kind in reliable)


def test_kinds_lose_accuracy_at_different_layers(accuracies):
    """Early insertion costs little; the last layer costs some kinds much and others little."""
    accuracy, _ = accuracies
    visual_kinds = [kind for kind in accuracy if kind not in TEXT_KINDS]
    assert all(accuracy[kind][1] >= accuracy[kind][0] - 0.1 for kind in visual_kinds)
    drops = [accuracy[kind][0] - accuracy[kind][2] for kind in visual_kinds]
    assert max(drops) >= min(drops) + 0.2


def test_generation_gives_the_correct_answers(tiny_backbone):
    """The answers come through the processor, the chat template and `generate`, as a user calls them."""
    rng = random.Random(5)
    is_correct = []
    for source in ("coco", "textvqa"):
        for _ in range(6):
            scene = draw_scene(source, rng, "held_out")
            question = questions(scene, rng)[0]
            content = [{"type": "image"}, {"type": "text", "text": question.text}]
            text = tiny_backbone.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            inputs = tiny_backbone.processor(images=[render(scene)], text=[text], return_tensors="pt")
            output = tiny_backbone.model.generate(**inputs, max_new_tokens=16, do_sample=False)
            answer = tiny_backbone.tokenizer.decode(
                output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            is_correct.append(answer.strip() == question.answer)
    assert sum(is_correct) >= 10


def test_any_text_encodes_and_answers_are_short():
    tokenizer = AutoProcessor.from_pretrained(TINY).tokenizer
    for text in ("What color is the circle?", "Grüße, 東京! 🦉\n\t", "C1=CC=CC=C1"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for word in (*COLOURS, *SHAPES, *WORDS, *map(str, range(19))):
        assert len(tokenizer.encode(f" {word}")) == 1


def test_the_chat_template_is_llavas():
    processor = AutoProcessor.from_pretrained(TINY)
    image = {"type": "image"}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What color is it?"}, image]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": "And its shape?"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "USER: <image>\nWhat color is it? ASSISTANT: red</s>USER: And its shape? ASSISTANT:"
    inputs = processor(images=[Image.new("RGB", (200, 120))], text=[text], return_tensors="pt")
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (inputs["input_ids"] == image_id).sum() == 64
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
