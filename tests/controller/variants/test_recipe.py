"""What is trained, in every family: the text model and the projector, never the encoder."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from backbones import deep_insert, insert_layer_of
from controller.options import FinetuneOptions
from controller.variants.parts import encoders, projectors
from controller.variants.recipe import (
    learning_rate,
    make_trainable,
    parameter_groups,
    projector_learning_rate,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "backbones"))

from zoo import FAMILIES

# Where a family's parts are; all the rest of its weights belong to the text model or the head.
PARTS = {
    "llava": ("model.vision_tower", "model.multi_modal_projector"),
    "llava_next": ("model.vision_tower", "model.multi_modal_projector"),
    "llava_onevision": ("model.vision_tower", "model.multi_modal_projector"),
    "qwen2_5_vl": ("model.visual", "model.visual.merger"),
    "qwen2_audio": ("model.audio_tower", "model.multi_modal_projector"),
}
LORA = FinetuneOptions(out=Path(), data=Path(), method="lora", lora_rank=2)
FULL = FinetuneOptions(out=Path(), data=Path(), method="full", learning_rate=1e-3)


def groups_of(model, options: FinetuneOptions) -> list[dict]:
    return parameter_groups(model, learning_rate(options), projector_learning_rate(options))


@pytest.fixture(scope="module", params=list(PARTS))
def model(request: pytest.FixtureRequest):
    return deep_insert(FAMILIES[request.param].model(), 2)


@pytest.fixture
def parts(model) -> tuple[str, str]:
    return next(value for name, value in PARTS.items() if name == model.config.model_type)


def test_encoder_and_projector_are_found(model, parts: tuple[str, str]) -> None:
    assert (list(encoders(model)), list(projectors(model))) == ([parts[0]], [parts[1]])


def test_full_trains_all_but_the_encoder(model, parts: tuple[str, str]) -> None:
    trained = make_trainable(copy.deepcopy(model), FULL)
    encoder, projector = (f"{part}." for part in parts)
    for name, weight in trained.named_parameters():
        assert weight.requires_grad == (name.startswith(projector) or not name.startswith(encoder)), name
    (group,) = groups_of(trained, FULL)
    assert group["lr"] == 1e-3
    assert len(group["params"]) == sum(weight.requires_grad for weight in trained.parameters())


def test_lora_trains_every_linear_of_the_text_model_and_the_projector(model, parts: tuple[str, str]) -> None:
    trained = make_trainable(copy.deepcopy(model), LORA)
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.language_model.")
    }
    names = {
        name.removeprefix("base_model.model.") for name, w in trained.named_parameters() if w.requires_grad
    }
    adapted = {name.partition(".lora_")[0] for name in names if ".lora_" in name}
    whole = {name.partition(".modules_to_save.")[0] for name in names if ".lora_" not in name}
    assert adapted == linear and linear
    assert whole == {parts[1]}
    main, projector = groups_of(trained, LORA)
    assert (main["lr"], projector["lr"]) == (2e-4, pytest.approx(2e-5))
    assert len(main["params"]) == 2 * len(linear)


def test_merging_gives_the_stock_model_back_with_what_lora_learnt(model) -> None:
    trained = make_trainable(copy.deepcopy(model), LORA)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.1)
    merged = trained.merge_and_unload()
    before, after = model.state_dict(), merged.state_dict()
    assert before.keys() == after.keys() and type(merged) is type(model)
    assert insert_layer_of(merged) == 2
    layer = next(
        name for name in before if name.endswith("layers.0.self_attn.q_proj.weight") and "language" in name
    )
    assert not torch.equal(before[layer], after[layer])
