"""Checkpoints in the published format: found, loaded whole, with their insert layer; what is not, refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from zoo import FAMILIES, TEXT, logits_of, skip_here

from deepinsert.backbones import load_backbone
from deepinsert.backbones.compat.transformers import pil_image_processor
from deepinsert.backbones.loading import TINY, fingerprint


def test_what_is_saved_is_loaded(tiny_backbone, tmp_path):
    with tiny_backbone.insert_at(0):
        tiny_backbone.save_pretrained(tmp_path)
    again = load_backbone(tmp_path, device="cpu")
    assert again.fingerprint == tiny_backbone.fingerprint
    assert again.insert_layer == 0
    assert load_backbone(tmp_path, insert_layer=5, device="cpu").insert_layer == 5
    assert type(again.model) is LlavaForConditionalGeneration
    assert again.tokenizer.get_vocab() == tiny_backbone.tokenizer.get_vocab()


def test_a_checkpoint_whose_weights_are_not_found_is_refused(tiny_backbone, tmp_path):
    """As where another version of transformers has named them: stock code would leave them random."""
    tiny_backbone.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("vision_tower", "tower"): weight for name, weight in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        OSError, match=r"55 weights of the model are not in the checkpoint, such as \S*vision_tower"
    ):
        load_backbone(tmp_path, device="cpu")


def test_a_folder_without_a_model_is_refused(tmp_path):
    """Stock code of early 5.x guesses the model type from the folder's name."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"empty holds neither a config\.json nor an adapter"):
        load_backbone(tmp_path / "empty", device="cpu")


def test_the_fingerprint_does_not_know_the_names(tiny_backbone):
    """They differ between versions of transformers, and what a policy was trained on does not."""
    model = copy.deepcopy(tiny_backbone.model)
    model.model.another_tower = model.model.vision_tower
    del model.model.vision_tower
    assert fingerprint(model) == tiny_backbone.fingerprint


def test_the_fingerprint_knows_the_weights(tiny_backbone, tmp_path):
    other = load_backbone("tiny", device="cpu")
    assert other.fingerprint == tiny_backbone.fingerprint
    with torch.no_grad():
        other.model.get_input_embeddings().weight.add_(0.1)
    other.save_pretrained(tmp_path)
    assert load_backbone(tmp_path, device="cpu").fingerprint != tiny_backbone.fingerprint


def test_a_backbone_in_another_precision():
    backbone = load_backbone("tiny", device="cpu", dtype="bfloat16")
    assert backbone.model.dtype == torch.bfloat16
    assert load_backbone("tiny", device="cpu").model.dtype == torch.float32


def test_a_layer_that_the_model_does_not_have():
    with pytest.raises(ValueError, match=r"insert layer \[99\]: give 0 .stock. to 8"):
        load_backbone("tiny", insert_layer=99, device="cpu")


def test_no_such_model(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        load_backbone(tmp_path / "nowhere")


def test_a_text_model_is_refused(tmp_path):
    LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LlamaConfig"):
        load_backbone(tmp_path)


def test_a_processor_whose_video_half_needs_torchvision(tmp_path):
    """Qwen2.5-VL as it is published: images work where torchvision is missing."""
    family = FAMILIES["qwen2_5_vl"]
    stock = family.model()
    stock.save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(TINY).save_pretrained(tmp_path)
    kind = pil_image_processor("qwen2_vl", "Qwen2VL")
    kind(patch_size=4, size={"shortest_edge": 256, "longest_edge": 1024}).save_pretrained(tmp_path)
    _edit(tmp_path / "tokenizer_config.json", processor_class="Qwen2_5_VLProcessor")
    _edit(tmp_path / "preprocessor_config.json", processor_class="Qwen2_5_VLProcessor")
    try:
        AutoImageProcessor.from_pretrained(tmp_path)
    except (ImportError, ValueError) as error:
        skip_here(f"stock code finds no image processor without torchvision: {error}"[:120])
    backbone = load_backbone(tmp_path, device="cpu")
    assert type(backbone.processor).__name__ == "Qwen2_5_VLProcessor"
    assert type(backbone.processor.image_processor).__name__.startswith("Qwen2VLImageProcessor")
    inputs = family.batch(stock, [(3, 0, 4)])
    assert torch.equal(logits_of(backbone.model, inputs), logits_of(stock, inputs))


def _edit(path: Path, **entries: str) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
