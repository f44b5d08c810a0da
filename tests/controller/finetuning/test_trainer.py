"""The trainer's losses do not depend on how they are computed, and equal those of TRL's trainer."""

import json
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PrinterCallback, TrainingArguments

from deepinsert.backbones import load_backbone
from deepinsert.backbones.compat.trainer import recomputation_arguments
from deepinsert.controller.finetuning import finetune
from deepinsert.controller.finetuning.batches import PromptDataset, collator
from deepinsert.controller.finetuning.variant_trainer import VariantTrainer
from deepinsert.controller.options import FinetuneOptions
from deepinsert.envs.data.instructions import load_instructions
from deepinsert.envs.prompts import prompts_from


@pytest.fixture(scope="module")
def options(small_run: FinetuneOptions) -> FinetuneOptions:
    return replace(small_run, steps=4, batch_size=4, save_every=100)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "lora"},
        {"method": "full"},
        {"method": "full", "insert_layer": "random", "distillation": 0.5},
    ],
    ids=["lora", "full", "random"],
)
def test_gradient_checkpointing_changes_no_loss(
    options: FinetuneOptions, tmp_path: Path, changes: dict[str, Any]
) -> None:
    run = replace(options, **changes)
    stored = finetune.run(replace(run, out=tmp_path / "stored"))
    recomputed = finetune.run(replace(run, gradient_checkpointing=True, out=tmp_path / "recomputed"))
    assert len(stored["train_loss_curve"]) == 4
    assert recomputed["train_loss_curve"] == pytest.approx(stored["train_loss_curve"], abs=1e-5)


def test_epochs_determine_the_number_of_steps(options: FinetuneOptions, tmp_path: Path) -> None:
    run = replace(options, steps=None, epochs=1.5, method="projector", out=tmp_path / "run")
    result = finetune.run(run)
    batches = -(-result["prompts"] // 4)
    assert result["steps"] == len(result["train_loss_curve"]) == -(-3 * batches // 2)
    before = load_backbone("tiny", device="cpu").model.state_dict()
    after = load_backbone(run.out / "checkpoint", device="cpu").model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "multi_modal_projector" in name}


def test_a_training_that_diverges_stops(options: FinetuneOptions, tmp_path: Path) -> None:
    run = replace(options, method="full", learning_rate=1e30, save_every=1, out=tmp_path / "run")
    diverged = r"step \d: (loss|grad_norm) is (nan|inf)\. Training has diverged: .* than 1e\+30"
    with pytest.raises(ValueError, match=diverged):
        finetune.run(run)
    checkpoints = list((run.out / "training").glob("checkpoint-*/model.safetensors"))
    assert checkpoints
    for path in checkpoints:
        assert all(weight.isfinite().all() for weight in load_file(path).values())


def test_uneven_batches_of_processes_with_sharded_weights_are_refused(
    options: FinetuneOptions, tmp_path: Path
) -> None:
    """The trainer checks the batches if DeepSpeed shards the weights."""
    prompts = prompts_from(load_instructions(options.data), per="record")
    assert {bool(prompt.images) for prompt in prompts} == {True, False}
    for group_by, subset, is_valid in (
        ("none", prompts, False),
        ("modality-length", prompts, True),
        ("none", [prompt for prompt in prompts if prompt.images], True),
    ):
        run = replace(options, group_by=group_by, out=tmp_path / "run")
        trainer = finetune.make_trainer(load_backbone("tiny", device="cpu"), subset, run)
        error = pytest.raises(ValueError, match=r"with and without images.*--group-by modality-length")
        with nullcontext() if is_valid else error:
            trainer._prepare_uneven_batches()


def test_a_single_step_learns(
    options: FinetuneOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = replace(options, steps=None, method="projector", batch_size=64, out=tmp_path / "run")
    assert finetune.run(run)["steps"] == 1
    before = load_backbone("tiny", device="cpu").model.state_dict()
    after = load_backbone(run.out / "checkpoint", device="cpu").model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert "1 steps of 64 prompts are few to learn in: give more --epochs" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0.0}, "--epochs 0.0"),
        ({"projector_learning_rate": -1.0}, "--projector-learning-rate -1.0"),
        ({"lora_dropout": 1.0}, "--lora-dropout 1.0"),
        ({"global_batch_size": 8}, "--gradient-accumulation 1 and --global-batch-size 8"),
        ({"report_to": "nowhere"}, "--report-to nowhere"),
    ],
)
def test_invalid_options_are_refused(
    options: FinetuneOptions, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        finetune.run(replace(options, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_qlora_without_bitsandbytes_names_what_to_install(options: FinetuneOptions, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pip install 'deepinsert\[qlora\]'"):
        finetune.run(replace(options, method="qlora", out=tmp_path / "run"))


def test_qlora_merges_into_ordinary_weights(options: FinetuneOptions, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    run = replace(options, method="qlora", lora_dropout=0.0, out=tmp_path / "run")
    result = finetune.run(run)
    assert result["train_loss_curve"] == pytest.approx(
        finetune.run(replace(run, method="lora", out=tmp_path / "lora"))["train_loss_curve"], abs=0.05
    )
    config = json.loads((run.out / "checkpoint" / "config.json").read_text())
    assert "quantization_config" not in config and config["deepinsert"]["insert_layer"] == 3
    before = load_backbone("tiny", device="cpu").model.state_dict()
    after = load_file(run.out / "checkpoint" / "model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in after.values())
    merged = load_backbone(run.out / "checkpoint", device="cpu")
    assert merged.insert_layer == 3
    # The change by LoRA has rank 4; rounding to 4 bits would raise the rank.
    name = "model.language_model.layers.5.self_attn.q_proj.weight"
    change = merged.model.state_dict()[name] - before[name]
    values = torch.linalg.svdvals(change.double())
    assert values[0] > 0 and values[4] < 1e-4 * values[0]


def test_trl_gives_the_same_losses(options: FinetuneOptions, tmp_path: Path) -> None:
    """TRL's `SFTTrainer`, which computes the loss in its own head, gives the same losses for 20 steps."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    prompts = prompts_from(load_instructions(options.data), per="record")[:30]
    settings = dict(
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=1e-4,  # low, because Adam amplifies rounding errors of zero gradients
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        bf16=False,
        seed=0,
        data_seed=0,
        gradient_accumulation_steps=1,
    )
    rows = PromptDataset(prompts)
    curves = {}
    for name in ("ours", "trl"):
        backbone = load_backbone("tiny", insert_layer=6, device="cpu")
        collate = collator(backbone)
        folder = str(tmp_path / name)
        if name == "ours":
            trainer = VariantTrainer(
                backbone.model,
                TrainingArguments(output_dir=folder, label_names=["labels"], **settings),
                train_dataset=rows,
                data_collator=collate,
            )
        else:
            trainer = trl.SFTTrainer(
                backbone.model,
                args=trl.SFTConfig(
                    output_dir=folder,
                    max_length=None,
                    **{key: False for key in recomputation_arguments(False) if not key.endswith("kwargs")},
                    dataset_kwargs={"skip_prepare_dataset": True},
                    **settings,
                ),
                processing_class=backbone.processor,
                train_dataset=datasets.Dataset.from_dict({"position": range(len(rows))}),
                data_collator=lambda batch, make=collate: make([rows[row["position"]] for row in batch]),
            )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        curves[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(curves["ours"]) == 20
    assert curves["trl"] == pytest.approx(curves["ours"], abs=1e-5)
