"""Checkpoints in the published format load completely, with their insert layer; others are refused."""

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


def test_a_saved_backbone_is_loaded_completely(tiny_backbone, tmp_path):
    with tiny_backbone.insert_at(0):
        tiny_backbone.save_pretrained(tmp_path)
    loaded = load_backbone(tmp_path, device="cpu")
    assert loaded.fingerprint == tiny_backbone.fingerprint
    assert loaded.insert_layer == 0
    assert load_backbone(tmp_path, insert_layer=5, device="cpu").insert_layer == 5
    assert type(loaded.model) is LlavaForConditionalGeneration
    assert loaded.tokenizer.get_vocab() == tiny_backbone.tokenizer.get_vocab()


def test_a_checkpoint_with_missing_weights_is_refused(tiny_backbone, tmp_path):
    """Other versions of transformers may name weights differently; stock code would leave them random."""
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


def test_the_fingerprint_does_not_depend_on_the_names_of_weights(tiny_backbone):
    """Names differ between versions of transformers, and a policy must recognise its backbone under each."""
    model = copy.deepcopy(tiny_backbone.model)
    model.model.another_tower = model.model.vision_tower
    del model.model.vision_tower
    assert fingerprint(model) == tiny_backbone.fingerprint


def test_the_fingerprint_depends_on_the_weights(tiny_backbone, tmp_path):
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


def test_a_layer_that_the_model_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"insert layer \[99\]: give 0 .stock. to 8"):
        load_backbone("tiny", insert_layer=99, device="cpu")


def test_a_model_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        load_backbone(tmp_path / "nowhere")


def test_a_text_model_is_refused(tmp_path):
    LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LlamaConfig"):
        load_backbone(tmp_path)


def test_images_work_without_torchvision_though_videos_need_it(tmp_path):
    """Qwen2.5-VL's processor, as it is published, has a video part that needs torchvision."""
    family = FAMILIES["qwen2_5_vl"]
    stock = family.model()
    stock.save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(TINY).save_pretrained(tmp_path)
    image_processor = pil_image_processor("qwen2_vl", "Qwen2VL")
    size = {"shortest_edge": 256, "longest_edge": 1024}
    image_processor(patch_size=4, size=size).save_pretrained(tmp_path)
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
