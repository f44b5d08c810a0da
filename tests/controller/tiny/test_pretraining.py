"""The tiny backbone's recipe: packed questions have the losses they have alone, and the whole recipe runs."""

from __future__ import annotations

import json
import random

import pytest
import torch

from deepinsert.backbones import insert_at, load_backbone
from deepinsert.backbones.loading import TINY
from deepinsert.controller.tiny.alignment import GROUPS, describe_patches, pixels
from deepinsert.controller.tiny.card import write_card
from deepinsert.controller.tiny.muon import orthogonalise
from deepinsert.controller.tiny.packing import answer_scores, by_question, pack
from deepinsert.controller.tiny.pretraining import ALL_KINDS, PretrainTinyOptions, draw_insert_layer, run
from deepinsert.envs.data.rendering import draw_scene, questions, render


@pytest.mark.parametrize("insert_layer", [0, 3, 8])
def test_a_packed_question_has_the_loss_it_has_alone(tiny_backbone, insert_layer):
    model, processor = tiny_backbone.model, tiny_backbone.processor
    rng = random.Random(0)
    scenes = [draw_scene(source, rng, "train") for source in ("gqa", "coco")]
    dialogues = [[[question] for question in questions(scene, rng, ALL_KINDS)[:5]] for scene in scenes]
    images = [render(scene) for scene in scenes]
    packed = pack(processor.tokenizer, dialogues, pixels(images))
    with torch.no_grad():
        packed_losses = by_question(packed, answer_scores(model, packed, insert_layer)[0], "mean")
        separate_losses = []
        for image, branches in zip(images, dialogues, strict=True):
            for [question] in branches:
                content = [{"type": "image"}, {"type": "text", "text": question.text}]
                answer = [{"type": "text", "text": question.answer}]
                messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
                text = processor.apply_chat_template(messages)
                inputs = processor(images=[image], text=[text], return_tensors="pt")
                prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
                start = processor(images=[image], text=[prompt], return_tensors="pt")["input_ids"].shape[1]
                with insert_at(model, insert_layer):
                    logits = model(**inputs).logits[0, start - 1 : -1]
                labels = inputs["input_ids"][0, start:]
                separate_losses.append(torch.nn.functional.cross_entropy(logits, labels))
    torch.testing.assert_close(packed_losses, torch.stack(separate_losses), atol=1e-5, rtol=1e-4)


def test_patches_are_described_by_the_items_on_them():
    rng = random.Random(3)
    for _ in range(50):
        scene = draw_scene("gqa", rng, "train")
        labels = describe_patches(scene)
        names = {GROUPS["what"][label] for label in labels[0]} - {"empty"}
        assert names == {item.what for item in scene.items}
        assert ((labels[1] >= 0) == (labels[0] > 0)).all()


def test_orthogonalised_updates_are_nearly_orthogonal():
    torch.manual_seed(0)
    for shape in ((3, 16, 16), (2, 48, 16), (2, 16, 48)):
        singular_values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert singular_values.min() > 0.3 and singular_values.max() < 1.5


def test_insert_layers_are_drawn_as_the_card_describes():
    rng = random.Random(0)
    layers = [draw_insert_layer(rng, 8) for _ in range(4000)]
    assert 0.46 < layers.count(0) / len(layers) < 0.54
    counts = [layers.count(layer) for layer in range(1, 8)]
    assert counts == sorted(counts, reverse=True) and counts[-1] > 0


def test_the_whole_recipe_in_seconds(tmp_path):
    result = run(PretrainTinyOptions(out=tmp_path, quick=True))
    folder = tmp_path / "model"
    assert json.loads((folder / "figures.json").read_text())["loss"] == result["loss"]
    assert "| caption |" in (folder / "README.md").read_text()
    assert (folder / "curves.png").stat().st_size > 0

    backbone = load_backbone(folder)
    assert backbone.num_layers == 8 and backbone.insert_layer == 0
    assert backbone.tokenizer.get_vocab() == load_backbone("tiny").tokenizer.get_vocab()


def test_the_card_that_ships_is_written_from_its_figures(tmp_path):
    figures = json.loads((TINY / "figures.json").read_text())
    write_card(figures, tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == (TINY / "README.md").read_text()
