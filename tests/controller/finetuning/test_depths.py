"""One model for all depths: each row of a batch draws its insert layer and has the loss of that layer."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deepinsert.backbones import Backbone, load_backbone
from deepinsert.controller.finetuning import finetune
from deepinsert.controller.finetuning.depths import DepthSampler, make_depths
from deepinsert.controller.finetuning.variant_trainer import VariantTrainer
from deepinsert.controller.learning import train_policy
from deepinsert.controller.option_checks import check
from deepinsert.controller.options import FinetuneOptions, TrainPolicyOptions
from deepinsert.controller.policy.layer_policy import LayerPolicy
from deepinsert.envs.data.instructions import load_instructions
from deepinsert.envs.prompts import IGNORED, Prompt, answer_loss, encode, prompts_from

ROWS = 6


@pytest.fixture(scope="module")
def options(small_run: FinetuneOptions) -> FinetuneOptions:
    return replace(
        small_run, insert_layer="random", method="full", steps=10, gradient_accumulation=2, save_every=3
    )


@pytest.fixture(scope="module")
def prompts(rendered_data: Path) -> list[Prompt]:
    """Four prompts with images, and text alone at positions 2 and 5."""
    all_prompts = prompts_from(load_instructions(rendered_data), per="record")
    with_image = [prompt for prompt in all_prompts if prompt.images]
    text = [prompt for prompt in all_prompts if not prompt.images]
    return [*with_image[:2], text[0], *with_image[2:4], text[1]]


@pytest.fixture
def trainer(options: FinetuneOptions, prompts: list[Prompt], tmp_path: Path) -> VariantTrainer:
    backbone = load_backbone("tiny", device="cpu")
    return finetune.make_trainer(backbone, prompts, replace(options, out=tmp_path, batch_size=ROWS))


def batch_of(trainer: VariantTrainer) -> dict[str, torch.Tensor]:
    """Return all prompts in one batch, as the data loader makes it."""
    dataset = trainer.train_dataset
    return trainer.data_collator([dataset[index] for index in range(len(dataset))])


def count_answer_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (batch["labels"][:, 1:] != IGNORED).sum()


def sampler(count: int = 4_000, seed: int = 0) -> DepthSampler:
    return DepthSampler(tuple(range(8)), np.ones(count, dtype=bool), seed)


def test_a_draw_depends_only_on_seed_epoch_and_position() -> None:
    whole, part = sampler(seed=3), sampler(100, seed=3)
    assert whole.layers_of_rows([90, 7, 7], 2) == [part.layers(2)[index] for index in (90, 7, 7)]
    first = whole.layers(2).copy()
    assert not np.array_equal(first, whole.layers(1))
    assert np.array_equal(first, whole.layers(2))
    assert not np.array_equal(first, sampler(seed=4).layers(2))


def test_draws_follow_the_distribution() -> None:
    shares = np.bincount(sampler().layers(0), minlength=8) / 4_000
    assert np.abs(shares - 1 / 8).max() < 5 * np.sqrt(1 / 8 * 7 / 8 / 4_000)
    probabilities = np.array([[0.7, 0.2, 0.1], [0.0, 0.0, 1.0]]).repeat(2_000, axis=0)
    layers = DepthSampler((0, 3, 6), np.ones(4_000, dtype=bool), probabilities=probabilities).layers(0)
    assert set(layers[2_000:]) == {6}
    shares = np.array([(layers[:2_000] == layer).mean() for layer in (0, 3, 6)])
    assert np.abs(shares - probabilities[0]).max() < 5 * np.sqrt(0.21 / 2_000)


def test_a_step_has_one_layer_if_weights_are_sharded() -> None:
    depths = sampler(10, seed=1)
    layers = [depths.layer_of_step(step) for step in range(2_000)]
    other_data = sampler(99, seed=1)
    assert layers == [other_data.layer_of_step(step) for step in range(2_000)]
    assert np.abs(np.bincount(layers, minlength=8) / 2_000 - 1 / 8).max() < 5 * np.sqrt(1 / 8 * 7 / 8 / 2_000)


def test_text_alone_stays_at_layer_0(trainer: VariantTrainer) -> None:
    depths = trainer.depths
    assert depths is not None
    layers = np.stack([depths.layers(epoch) for epoch in range(40)])
    assert (layers[:, [2, 5]] == 0).all()
    assert set(layers[:, 0]) == set(range(8))


def test_the_loss_is_that_of_each_row_at_its_layer(
    trainer: VariantTrainer, prompts: list[Prompt], tiny_backbone: Backbone
) -> None:
    batch = batch_of(trainer)
    trainer.model.train()
    for epoch in (0.0, 1.25):
        trainer.state.epoch = epoch
        layers = trainer.depths.layers(int(epoch)).tolist()
        expected, total = 0.0, 0
        for prompt, layer in zip(prompts, layers, strict=True):
            inputs = encode(tiny_backbone.processor, [prompt])
            labels = inputs.pop("labels")
            with tiny_backbone.insert_at(layer), torch.no_grad():
                logits = tiny_backbone.model(**inputs).logits
            tokens = int((labels[:, 1:] != IGNORED).sum())
            expected += tokens * float(answer_loss(logits, labels))
            total += tokens
        assert total == count_answer_tokens(batch)
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=total)
        assert float(loss.detach()) == pytest.approx(expected / total, abs=1e-5)


def test_evaluation_is_at_the_installed_layer(trainer: VariantTrainer, tiny_backbone: Backbone) -> None:
    batch = batch_of(trainer)
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch)
    inputs = {name: value for name, value in batch.items() if name != "row_index"}
    with torch.no_grad():
        assert float(loss) == pytest.approx(float(tiny_backbone.model(**inputs).loss), abs=1e-6)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_distillation_is_the_divergence_from_layer_0(
    trainer: VariantTrainer, prompts: list[Prompt], tiny_backbone: Backbone, weight: float
) -> None:
    batch = batch_of(trainer)
    trainer.model.train()
    trainer.depths.distillation = weight
    layers = trainer.depths.layers(0).tolist()
    assert 0 in layers and max(layers) > 0
    expected = 0.0
    for prompt, layer in zip(prompts, layers, strict=True):
        inputs = encode(tiny_backbone.processor, [prompt])
        labels = inputs.pop("labels")[0, 1:]
        logs = []
        for insert_layer in (0, layer):
            with tiny_backbone.insert_at(insert_layer), torch.no_grad():
                logs.append(tiny_backbone.model(**inputs).logits[0, :-1].log_softmax(dim=-1))
        teacher, student = (log[labels != IGNORED].double() for log in logs)
        labels = labels[labels != IGNORED]
        entropy = -student[torch.arange(len(labels)), labels].sum()
        divergence = (teacher.exp() * (teacher - student)).sum()
        share = weight if layer > 0 else 0.0
        expected += float((1 - share) * entropy + share * divergence)
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=int(count_answer_tokens(batch)))
    assert float(loss.detach()) == pytest.approx(expected / int(count_answer_tokens(batch)), abs=1e-5)


def test_the_teacher_gets_no_gradient(trainer: VariantTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is that of a loss with a constant teacher, computed beforehand."""
    model, depths = trainer.model, trainer.depths
    batch = batch_of(trainer)
    inputs = {name: value for name, value in batch.items() if name not in ("row_index", "labels")}
    is_answer = batch["labels"][:, 1:] != IGNORED
    backbone = load_backbone("tiny", device="cpu")
    with torch.no_grad():
        teacher = backbone.model(**inputs).logits[:, :-1].softmax(dim=-1)
    layers = depths.layers(0)
    is_student = is_answer & torch.from_numpy(layers > 0)[:, None]
    depths.distillation = 1.0
    model.train()
    trainer.compute_loss(model, batch, num_items_in_batch=int(count_answer_tokens(batch))).backward()
    backbone.model.train()
    with backbone.insert_at(layers.tolist()):
        logs = backbone.model(**inputs).logits[:, :-1].log_softmax(dim=-1)
    divergence = (teacher * (teacher.log() - logs)).sum(dim=-1)[is_student].sum()
    labelled = is_answer & ~is_student
    entropy = -logs[labelled].gather(1, batch["labels"][:, 1:][labelled][:, None]).sum()
    ((divergence + entropy) / count_answer_tokens(batch)).backward()
    expected = dict(backbone.model.named_parameters())
    compared = 0
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(weight.grad, expected[name].grad, atol=2e-5, rtol=1e-3)
            compared += 1
    assert compared > 50


def test_a_killed_run_ends_with_the_same_weights(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps reach a third pass over the data; its draws and order do not depend on the interruption."""
    whole = replace(options, out=tmp_path / "whole", distillation=0.5, group_by="modality-length")
    result = finetune.run(whole)
    assert result["insert_layer"] == 0 and result["trained_layers"] == list(range(8))
    run = replace(whole, out=tmp_path / "run")

    def interrupt(self: object, args: object, state: object, *rest: object, **kwargs: object) -> None:
        if state.global_step == 8:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune.LossLog, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune.run(run)
    assert finetune.run(run)["train_loss_curve"] == result["train_loss_curve"]
    ends = [load_file(out / "checkpoint" / "model.safetensors") for out in (whole.out, run.out)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    record = json.loads((run.out / "checkpoint" / "config.json").read_text())["deepinsert"]
    assert record == {"insert_layer": 0, "trained_layers": list(range(8))}
    loaded = load_backbone(run.out / "checkpoint", device="cpu")
    assert loaded.model.config.deepinsert == record
    fixed = replace(
        options, out=tmp_path / "fixed", backbone=str(run.out / "checkpoint"), insert_layer=2, steps=1
    )
    finetune.run(fixed)
    record = json.loads((fixed.out / "checkpoint" / "config.json").read_text())["deepinsert"]
    assert record == {"insert_layer": 2}


@pytest.fixture(scope="module")
def policy(rendered_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("policy") / "run"
    train_policy.run(
        TrainPolicyOptions(
            out=out,
            data=rendered_data,
            sources="coco",
            algorithm="full-info",
            insert_layers="0,4,6",
            seeds=1,
            steps=2_000,
            device="cpu",
        )
    )
    return out


def test_a_policy_gives_each_prompt_its_probabilities(
    options: FinetuneOptions, policy: Path, prompts: list[Prompt], tiny_backbone: Backbone
) -> None:
    depths = make_depths(replace(options, layer_distribution=str(policy)), tiny_backbone, prompts)
    assert depths is not None and depths.candidates == (0, 4, 6)
    loaded = LayerPolicy.load(policy, tiny_backbone)
    rows = [0, 1, 3, 4]
    expected = loaded.probabilities(loaded.observation(tiny_backbone, [prompts[row] for row in rows]))
    np.testing.assert_allclose(depths.probabilities[rows], expected, atol=1e-6)
    assert set(depths.layers(0)) <= {0, 4, 6}
    assert depths.identity["layer distribution"] != "uniform"


def test_a_policy_of_another_backbone_is_refused(
    options: FinetuneOptions, policy: Path, prompts: list[Prompt]
) -> None:
    other = load_backbone("tiny", device="cpu")
    with torch.no_grad():
        other.model.get_input_embeddings().weight += 0.1
    with pytest.raises(ValueError, match="policy was trained on backbone"):
        make_depths(replace(options, layer_distribution=str(policy)), other, prompts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"insert_layer": 3, "distillation": 0.5}, "--distillation 0.5 goes with --insert-layer random"),
        ({"insert_layer": 3, "insert_layers": "0-3"}, "--insert-layers 0-3 goes with --insert-layer random"),
        ({"insert_layer": 3, "layer_distribution": "here"}, "--layer-distribution here goes with"),
        ({"distillation": 1.5}, "--distillation 1.5: give a weight between 0 and 1"),
        ({"distillation": float("nan")}, "--distillation nan: give a weight between 0 and 1"),
        ({"layer_distribution": "nowhere"}, "--layer-distribution nowhere: give uniform, or a run folder"),
        ({"insert_layers": "0,x"}, "'x' is neither a layer nor a range"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_loaded(
    options: FinetuneOptions, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(replace(options, **changes))


def test_missing_layers_and_missing_images_are_refused(
    options: FinetuneOptions, prompts: list[Prompt], tiny_backbone: Backbone
) -> None:
    with pytest.raises(ValueError, match="'9' is outside 0 to 8"):
        make_depths(replace(options, insert_layers="0,9"), tiny_backbone, prompts)
    with pytest.raises(ValueError, match=r"none of the 2 records .* has an image"):
        make_depths(options, tiny_backbone, [prompts[2], prompts[5]])
