"""A finetuned variant is an ordinary checkpoint, and a killed run ends with the same weights."""

import csv
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerState

from deepinsert.backbones import Backbone, load_backbone
from deepinsert.backbones.parts import encoders, lora_targets, projectors
from deepinsert.controller.finetuning import finetune
from deepinsert.controller.finetuning.checkpoints import checkpoint_folders
from deepinsert.controller.options import FinetuneOptions
from deepinsert.controller.runs.manifest import CheckpointError, check_complete
from deepinsert.envs.data.instructions import load_instructions
from deepinsert.envs.prompts import encode, prompts_from

STEPS = 10
ROOT = Path(__file__).parents[3]
CHILD_PROGRAM = """
import pickle, sys, torch
from deepinsert.controller.finetuning import finetune
threads, options = pickle.load(sys.stdin.buffer)
torch.set_num_threads(threads)
finetune.run(options)
"""


@pytest.fixture(scope="module")
def options(small_run: FinetuneOptions) -> FinetuneOptions:
    # The steps reach a third pass over the records; the last batch of each pass is smaller.
    return replace(small_run, steps=STEPS, gradient_accumulation=2, save_every=3)


@pytest.fixture(scope="module")
def finished(
    options: FinetuneOptions, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, FinetuneOptions]:
    """Return the options of uninterrupted runs by method."""
    runs = {}
    for method in ("lora", "full"):
        runs[method] = replace(options, method=method, out=tmp_path_factory.mktemp("whole") / method)
        finetune.run(runs[method])
    return runs


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoint" / "model.safetensors")


def read_log(out: Path) -> list[dict[str, str]]:
    with (out / "train_loss.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_checkpoint_is_a_stock_one_with_the_insert_layer(
    finished: dict[str, FinetuneOptions], method: str
) -> None:
    out = finished[method].out
    model, report = AutoModelForImageTextToText.from_pretrained(out / "checkpoint", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__module__.startswith("transformers.")
    assert json.loads((out / "checkpoint" / "config.json").read_text())["deepinsert"]["insert_layer"] == 3
    AutoProcessor.from_pretrained(out / "checkpoint")
    assert load_backbone(out / "checkpoint", device="cpu").insert_layer == 3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_run_folder_holds_result_log_and_picture(
    finished: dict[str, FinetuneOptions], method: str
) -> None:
    out = finished[method].out
    result = json.loads((out / "result.json").read_text())
    assert result["insert_layer"] == 3 and result["steps"] == STEPS and result["method"] == method
    assert result["checkpoint"] == str(out / "checkpoint")
    assert result["train_loss"] == pytest.approx(result["train_loss_curve"][-1])  # the last 10 % of 10 steps
    rows = read_log(out)
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert [float(row["loss"]) for row in rows] == result["train_loss_curve"]
    assert (out / "train_loss.png").is_file() and list(out.glob("events.out.tfevents.*"))
    assert (out / "adapter").is_dir() == (method == "lora")
    assert not (out / finetune.TRAINING).exists()


def test_only_the_weights_that_the_method_trains_change(
    finished: dict[str, FinetuneOptions], tiny_backbone: Backbone
) -> None:
    before = {name: weight.clone() for name, weight in tiny_backbone.model.state_dict().items()}
    changed = {}
    for method, run in finished.items():
        after = load_backbone(run.out / "checkpoint", device="cpu").model.state_dict()
        changed[method] = {name for name in before if not torch.equal(before[name], after[name])}
    model = tiny_backbone.model
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "language_model" in name
    }
    projector = {name for name in before if "multi_modal_projector" in name}
    assert changed["lora"] == linear | projector
    assert changed["full"] == {name for name in before if "vision_tower" not in name}


def test_the_recipe_names_the_parts_of_llava(tiny_backbone: Backbone) -> None:
    assert list(encoders(tiny_backbone.model)) == ["model.vision_tower"]
    assert list(projectors(tiny_backbone.model)) == ["model.multi_modal_projector"]
    assert "lm_head" not in lora_targets(tiny_backbone.model)


def test_the_adapter_on_the_backbone_is_the_merged_checkpoint(
    finished: dict[str, FinetuneOptions], rendered_data: Path
) -> None:
    out = finished["lora"].out
    merged = load_backbone(out / "checkpoint", device="cpu")
    backbone = load_backbone("tiny", insert_layer=3, device="cpu")
    adapted = PeftModel.from_pretrained(backbone.model, out / "adapter").eval()
    inputs = encode(backbone.processor, prompts_from(load_instructions(rendered_data))[:3])
    inputs.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(
            adapted(**inputs).logits, merged.model(**inputs).logits, atol=1e-4, rtol=1e-4
        )


def test_a_finished_run_is_not_repeated(finished: dict[str, FinetuneOptions]) -> None:
    run = finished["lora"]
    times = {path: path.stat().st_mtime_ns for path in run.out.rglob("*") if path.name != "config.json"}
    result = finetune.run(run)
    assert result == json.loads((run.out / "result.json").read_text())
    assert times == {path: path.stat().st_mtime_ns for path in times}


@pytest.mark.parametrize(("name", "value"), [("insert_layer", 4), ("seed", 1), ("learning_rate", 1e-2)])
def test_the_folder_of_another_run_is_refused(
    finished: dict[str, FinetuneOptions], name: str, value: float
) -> None:
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}"):
        finetune.run(replace(finished["lora"], **{name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("save_every", 0), ("learning_rate", -1.0), ("dtype", "float16")],
)
def test_options_that_cannot_be_used_are_refused(
    options: FinetuneOptions, tmp_path: Path, name: str, value: float | str
) -> None:
    with pytest.raises(ValueError, match=f"{name.replace('_', '[-_]')}.*{value}"):
        finetune.run(replace(options, out=tmp_path / "run", **{name: value}))


def start(run: FinetuneOptions) -> subprocess.Popen[bytes]:
    """Start the run in a new process, with as many threads as this one."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD_PROGRAM],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdin is not None
    child.stdin.write(pickle.dumps((torch.get_num_threads(), run)))
    child.stdin.close()
    return child


def kill(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGKILL)
    child.wait()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(
    finished: dict[str, FinetuneOptions], tmp_path: Path, method: str
) -> None:
    whole, run = finished[method], replace(finished[method], out=tmp_path / "run")
    child = start(run)
    manifest = run.out / finetune.TRAINING / "checkpoint-3" / "manifest.json"
    deadline = time.monotonic() + 600
    while not manifest.is_file() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    kill(child)
    assert child.returncode == -signal.SIGKILL, "the run ended before it was killed"
    assert not (run.out / "result.json").exists()
    before = read_log(run.out)[:3]
    finetune.run(run)
    assert_same_weights(run.out, whole.out)
    assert [row["loss"] for row in read_log(run.out)] == [row["loss"] for row in read_log(whole.out)]
    # Measured seconds differ from run to run; equal ones show that the first steps were not repeated.
    assert read_log(run.out)[:3] == before


def test_a_damaged_checkpoint_is_skipped(
    finished: dict[str, FinetuneOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(finished["full"], out=tmp_path / "run")

    def interrupt(self: object, args: object, state: TrainerState, *rest: object, **kwargs: object) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune.LossLog, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune.run(run)
    newest, before = checkpoint_folders(run.out / finetune.TRAINING)
    assert [newest.name, before.name] == ["checkpoint-6", "checkpoint-3"]
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was written"):
        check_complete(newest)
    finetune.run(run)
    assert_same_weights(run.out, finished["full"].out)
