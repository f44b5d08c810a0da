"""One model for all depths: rows are at the layers they draw, and learn what those layers' losses say."""

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
from deepinsert.controller.learning import train_policy as training
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
    """Two about images, one of text alone, and so on."""
    every = prompts_from(load_instructions(rendered_data), per="record")
    with_image = [prompt for prompt in every if prompt.images]
    text = [prompt for prompt in every if not prompt.images]
    return [*with_image[:2], text[0], *with_image[2:4], text[1]]


@pytest.fixture
def trainer(options: FinetuneOptions, prompts: list[Prompt], tmp_path: Path) -> VariantTrainer:
    backbone = load_backbone("tiny", device="cpu")
    return finetune.make_trainer(backbone, prompts, replace(options, out=tmp_path, batch_size=ROWS))


def batch_of(trainer: VariantTrainer) -> dict[str, torch.Tensor]:
    """All prompts in one batch, as the data loader makes it."""
    dataset = trainer.train_dataset
    return trainer.data_collator([dataset[index] for index in range(len(dataset))])


def items(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (batch["labels"][:, 1:] != IGNORED).sum()


def sampler(count: int = 4_000, **given: object) -> DepthSampler:
    return DepthSampler(tuple(range(8)), np.ones(count, dtype=bool), **given)  # type: ignore[arg-type]


def test_a_draw_depends_on_seed_epoch_and_position_alone() -> None:
    whole, part = sampler(seed=3), sampler(100, seed=3)
    assert whole.rows([90, 7, 7], 2) == [part.layers(2)[index] for index in (90, 7, 7)]
    first = whole.layers(2).copy()
    assert not np.array_equal(first, whole.layers(1))
    assert np.array_equal(first, whole.layers(2))
    assert not np.array_equal(first, sampler(seed=4).layers(2))


def test_draws_follow_the_distribution() -> None:
    shares = np.bincount(sampler().layers(0), minlength=8) / 4_000
    assert np.abs(shares - 1 / 8).max() < 5 * np.sqrt(1 / 8 * 7 / 8 / 4_000)
    own = np.array([[0.7, 0.2, 0.1], [0.0, 0.0, 1.0]]).repeat(2_000, axis=0)
    drawn = DepthSampler((0, 3, 6), np.ones(4_000, dtype=bool), probabilities=own).layers(0)
    assert set(drawn[2_000:]) == {6}
    shares = np.array([(drawn[:2_000] == layer).mean() for layer in (0, 3, 6)])
    assert np.abs(shares - own[0]).max() < 5 * np.sqrt(0.21 / 2_000)


def test_a_whole_step_has_one_layer_where_weights_are_sharded() -> None:
    depths = sampler(10, seed=1)
    drawn = [depths.of_step(step) for step in range(2_000)]
    assert drawn == [sampler(99, seed=1).of_step(step) for step in range(2_000)]  # whatever a process reads
    assert np.abs(np.bincount(drawn, minlength=8) / 2_000 - 1 / 8).max() < 5 * np.sqrt(1 / 8 * 7 / 8 / 2_000)


def test_text_alone_stays_at_layer_0(trainer: VariantTrainer) -> None:
    depths = trainer.depths
    assert depths is not None
    drawn = np.stack([depths.layers(epoch) for epoch in range(40)])
    assert (drawn[:, [2, 5]] == 0).all()
    assert set(drawn[:, 0]) == set(range(8))


def test_the_loss_is_that_of_each_row_at_its_own_layer(
    trainer: VariantTrainer, prompts: list[Prompt], tiny_backbone: Backbone
) -> None:
    batch = batch_of(trainer)
    trainer.model.train()
    for epoch in (0.0, 1.25):
        trainer.state.epoch = epoch
        drawn = trainer.depths.layers(int(epoch)).tolist()
        expected, counted = 0.0, 0
        for prompt, layer in zip(prompts, drawn, strict=True):
            inputs = encode(tiny_backbone.processor, [prompt])
            labels = inputs.pop("labels")
            with tiny_backbone.insert_at(layer), torch.no_grad():
                logits = tiny_backbone.model(**inputs).logits
            tokens = int((labels[:, 1:] != IGNORED).sum())
            expected += tokens * float(answer_loss(logits, labels))
            counted += tokens
        assert counted == items(batch)
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=counted)
        assert float(loss.detach()) == pytest.approx(expected / counted, abs=1e-5)


def test_evaluation_is_at_the_layer_in_force(trainer: VariantTrainer, tiny_backbone: Backbone) -> None:
    batch = batch_of(trainer)
    trainer.model.eval()
    found = trainer.compute_loss(trainer.model, batch)
    stock = {name: value for name, value in batch.items() if name != "row_index"}
    with torch.no_grad():
        assert float(found) == pytest.approx(float(tiny_backbone.model(**stock).loss), abs=1e-6)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_distillation_is_the_divergence_from_layer_0(
    trainer: VariantTrainer, prompts: list[Prompt], tiny_backbone: Backbone, weight: float
) -> None:
    batch = batch_of(trainer)
    trainer.model.train()
    trainer.depths.distillation = weight
    drawn = trainer.depths.layers(0).tolist()
    assert 0 in drawn and max(drawn) > 0
    expected = 0.0
    for prompt, layer in zip(prompts, drawn, strict=True):
        inputs = encode(tiny_backbone.processor, [prompt])
        labels = inputs.pop("labels")[0, 1:]
        logs = []
        for own in (0, layer):
            with tiny_backbone.insert_at(own), torch.no_grad():
                logs.append(tiny_backbone.model(**inputs).logits[0, :-1].log_softmax(dim=-1))
        teacher, student = (log[labels != IGNORED].double() for log in logs)
        labels = labels[labels != IGNORED]
        entropy = -student[torch.arange(len(labels)), labels].sum()
        divergence = (teacher.exp() * (teacher - student)).sum()
        share = weight if layer > 0 else 0.0
        expected += float((1 - share) * entropy + share * divergence)
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=int(items(batch)))
    assert float(loss.detach()) == pytest.approx(expected / int(items(batch)), abs=1e-5)


def test_the_teacher_gets_no_gradient(trainer: VariantTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is that of a loss whose teacher is a constant, computed before."""
    model, depths = trainer.model, trainer.depths
    batch = batch_of(trainer)
    stock = {name: value for name, value in batch.items() if name not in ("row_index", "labels")}
    kept = batch["labels"][:, 1:] != IGNORED
    backbone = load_backbone("tiny", device="cpu")
    with torch.no_grad():
        teacher = backbone.model(**stock).logits[:, :-1].softmax(dim=-1)
    drawn = depths.layers(0)
    taught = kept & torch.from_numpy(drawn > 0)[:, None]
    depths.distillation = 1.0
    model.train()
    trainer.compute_loss(model, batch, num_items_in_batch=int(items(batch))).backward()
    backbone.model.train()
    with backbone.insert_at(drawn.tolist()):
        logs = backbone.model(**stock).logits[:, :-1].log_softmax(dim=-1)
    divergence = (teacher * (teacher.log() - logs)).sum(dim=-1)[taught].sum()
    labelled = kept & ~taught
    entropy = -logs[labelled].gather(1, batch["labels"][:, 1:][labelled][:, None]).sum()
    ((divergence + entropy) / items(batch)).backward()
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
    """Steps reach into a third pass over the data, whose draws and order must not depend on where the run
    stopped."""
    whole = replace(options, out=tmp_path / "whole", distillation=0.5, group_by="modality-length")
    result = finetune.run(whole)
    assert result["insert_layer"] == 0 and result["trained_layers"] == list(range(8))
    run = replace(whole, out=tmp_path / "run")

    def interrupt(self: object, args: object, state: object, *rest: object, **kwargs: object) -> None:
        if state.global_step == 8:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune.LossLog, "on_step_end", interrupt)
        finetune.run(run)
    assert finetune.run(run)["train_loss_curve"] == result["train_loss_curve"]
    ends = [load_file(out / "checkpoint" / "model.safetensors") for out in (whole.out, run.out)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    said = json.loads((run.out / "checkpoint" / "config.json").read_text())["deepinsert"]
    assert said == {"insert_layer": 0, "trained_layers": list(range(8))}
    loaded = load_backbone(run.out / "checkpoint", device="cpu")
    assert loaded.model.config.deepinsert == said
    fixed = replace(
        options, out=tmp_path / "fixed", backbone=str(run.out / "checkpoint"), insert_layer=2, steps=1
    )
    finetune.run(fixed)
    said = json.loads((fixed.out / "checkpoint" / "config.json").read_text())["deepinsert"]
    assert said == {"insert_layer": 2}


@pytest.fixture(scope="module")
def policy(rendered_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("policy") / "run"
    training.run(
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


def test_a_policy_gives_each_prompt_its_own_chances(
    options: FinetuneOptions, policy: Path, prompts: list[Prompt], tiny_backbone: Backbone
) -> None:
    depths = make_depths(replace(options, layer_distribution=str(policy)), tiny_backbone, prompts)
    assert depths is not None and depths.candidates == (0, 4, 6)
    learnt = LayerPolicy.load(policy, tiny_backbone)
    rows = [0, 1, 3, 4]
    expected = learnt.probabilities(learnt.observation(tiny_backbone, [prompts[row] for row in rows]))
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
    ("changed", "message"),
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
def test_what_cannot_be_is_said_before_anything_is_loaded(
    options: FinetuneOptions, changed: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(replace(options, **changed))


def test_what_the_backbone_and_the_data_do_not_have_is_refused(
    options: FinetuneOptions, prompts: list[Prompt], tiny_backbone: Backbone
) -> None:
    with pytest.raises(ValueError, match="'9' is outside 0 to 8"):
        make_depths(replace(options, insert_layers="0,9"), tiny_backbone, prompts)
    with pytest.raises(ValueError, match=r"none of the 2 records .* has an image"):
        make_depths(options, tiny_backbone, [prompts[2], prompts[5]])
