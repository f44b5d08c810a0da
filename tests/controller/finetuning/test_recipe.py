"""In every model family, finetuning trains the text model and the projector, and never the encoder."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import FAMILIES

from deepinsert.backbones import deep_insert, insert_layer_of
from deepinsert.backbones.families import find_stack
from deepinsert.backbones.parts import encoders, lora_targets, projectors
from deepinsert.controller.finetuning.recipe import (
    accumulation,
    learning_rate,
    make_trainable,
    parameter_groups,
    projector_learning_rate,
    reporters,
)
from deepinsert.controller.options import FinetuneOptions

# Encoder and projector of each family; its other weights belong to the text model or the head.
PARTS = {
    "llava": ("model.vision_tower", "model.multi_modal_projector"),
    "llava_next": ("model.vision_tower", "model.multi_modal_projector"),
    "llava_onevision": ("model.vision_tower", "model.multi_modal_projector"),
    "qwen2_5_vl": ("model.visual", "model.visual.merger"),
    "qwen2_audio": ("model.audio_tower", "model.multi_modal_projector"),
}
# Encoders and projectors of families with several of them, or with other parts beside the text model.
OTHER_PARTS = {
    "qwen3_vl": (
        ["model.visual"],
        ["model.visual.merger", *(f"model.visual.deepstack_merger_list.{at}" for at in (0, 1))],
    ),
    "video_llava": (["model.image_tower", "model.video_tower"], ["model.multi_modal_projector"]),
    "granite_speech": (["model.encoder"], ["model.projector"]),
    "granite_docling": (["model.vision_model"], ["model.vision_model.connector"]),
    "chameleon": ([], []),
    "gemma3n-audio": (
        ["model.vision_tower", "model.audio_tower"],
        ["model.embed_vision", "model.embed_audio"],
    ),
}
LORA = FinetuneOptions(out=Path(), data=Path(), method="lora", lora_rank=2)
FULL = FinetuneOptions(out=Path(), data=Path(), method="full", learning_rate=1e-3)


def groups_of(model, options: FinetuneOptions) -> list[dict]:
    return parameter_groups(model, learning_rate(options), projector_learning_rate(options))


@pytest.fixture(scope="module", params=list(PARTS))
def model(request: pytest.FixtureRequest):
    return deep_insert(FAMILIES[request.param].model(), 2)


@pytest.fixture
def inner(model) -> str:
    """The prefix of all names but the head's; up to transformers 5.11, Qwen2-Audio has none."""
    return "model." if hasattr(model, "model") else ""


@pytest.fixture
def parts(model, inner: str) -> tuple[str, str]:
    encoder, projector = PARTS[model.config.model_type]
    return encoder.replace("model.", inner), projector.replace("model.", inner)


def test_encoder_and_projector_are_found(model, parts: tuple[str, str]) -> None:
    assert (list(encoders(model)), list(projectors(model))) == ([parts[0]], [parts[1]])


@pytest.mark.parametrize("name", OTHER_PARTS)
def test_families_with_more_parts(name: str) -> None:
    model = deep_insert(FAMILIES[name].model(), 2)
    assert (list(encoders(model)), list(projectors(model))) == OTHER_PARTS[name]
    stack = [id(module) for module in find_stack(model).modules() if isinstance(module, nn.Linear)]
    matched = [module for name, module in model.named_modules() if re.fullmatch(lora_targets(model), name)]
    assert [id(module) for module in matched] == stack and stack
    make_trainable(model, LORA)


def test_full_trains_all_but_the_encoder(model, parts: tuple[str, str]) -> None:
    trained = make_trainable(copy.deepcopy(model), FULL)
    encoder, projector = (f"{part}." for part in parts)
    for name, weight in trained.named_parameters():
        assert weight.requires_grad == (name.startswith(projector) or not name.startswith(encoder)), name
    (group,) = groups_of(trained, FULL)
    assert group["lr"] == 1e-3
    assert len(group["params"]) == sum(weight.requires_grad for weight in trained.parameters())


def test_lora_trains_every_linear_of_the_text_model_and_the_projector(
    model, inner: str, parts: tuple[str, str]
) -> None:
    trained = make_trainable(copy.deepcopy(model), LORA)
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(f"{inner}language_model.") and "head" not in name
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


def test_the_projector_alone_is_the_first_stage(model, parts: tuple[str, str]) -> None:
    options = replace(FULL, method="projector", learning_rate=None)
    trained = make_trainable(copy.deepcopy(model), options)
    names = {name for name, weight in trained.named_parameters() if weight.requires_grad}
    assert names and all(name.startswith(f"{parts[1]}.") for name in names)
    (group,) = groups_of(trained, options)
    assert group["lr"] == 1e-3 and len(group["params"]) == len(names)
    assert accumulation(options, 1) == 256 // options.batch_size


def test_the_projector_can_have_its_own_rate_in_full_finetuning(model, parts: tuple[str, str]) -> None:
    options = replace(FULL, projector_learning_rate=5e-3)
    trained = make_trainable(copy.deepcopy(model), options)
    main, projector = groups_of(trained, options)
    assert (main["lr"], projector["lr"]) == (1e-3, 5e-3)
    names = {id(weight): name for name, weight in trained.named_parameters()}
    assert all(names[id(weight)].startswith(f"{parts[1]}.") for weight in projector["params"])
    assert not any(names[id(weight)].startswith(f"{parts[1]}.") for weight in main["params"])


@pytest.mark.parametrize("options", [LORA, FULL], ids=["lora", "full"])
def test_frozen_parts_are_not_trained(model, parts: tuple[str, str], options: FinetuneOptions) -> None:
    layers = next(name for name, module in model.named_modules() if module is find_stack(model)) + ".layers"
    first = f"{layers}.0"
    trained = make_trainable(copy.deepcopy(model), replace(options, freeze=("projector", first, "vision")))
    names = {
        name.removeprefix("base_model.model.") for name, w in trained.named_parameters() if w.requires_grad
    }
    assert names and not any(name.startswith((f"{parts[1]}.", f"{first}.")) for name in names)
    assert any(name.startswith(f"{layers}.1.") for name in names)


def test_unknown_parts_and_nothing_to_train_are_refused(model) -> None:
    with pytest.raises(ValueError, match=r"--freeze tower: .*give vision, projector, language, embeddings"):
        make_trainable(copy.deepcopy(model), replace(FULL, freeze=("tower",)))
    with pytest.raises(ValueError, match="nothing to train"):
        make_trainable(copy.deepcopy(model), replace(FULL, method="projector", freeze=("projector",)))


@pytest.mark.parametrize(
    ("changes", "processes", "expected"),
    [
        ({}, 1, 4),
        ({"batch_size": 4}, 4, 8),
        ({"batch_size": 5}, 1, 26),
        ({"global_batch_size": 96}, 1, 3),
        ({"gradient_accumulation": 7}, 2, 7),
    ],
)
def test_accumulation_makes_the_global_batch(changes: dict, processes: int, expected: int) -> None:
    assert accumulation(replace(FULL, **changes), processes) == expected


def test_an_impossible_global_batch_and_an_unknown_reporter_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--global-batch-size 100: give a multiple of 64 .*2 processes"):
        accumulation(replace(FULL, global_batch_size=100), 2)
    with pytest.raises(ValueError, match="--report-to nowhere: give one of none, "):
        reporters("nowhere")


def test_merging_gives_the_stock_model_with_changed_weights(model) -> None:
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
