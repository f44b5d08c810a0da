"""Two processes with half the batch each give the losses of one process."""

import csv
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from deepinsert.backbones import Backbone
from deepinsert.controller.finetuning import finetune
from deepinsert.controller.finetuning.batches import PromptDataset, PromptOrder, collator
from deepinsert.controller.options import FinetuneOptions
from deepinsert.controller.runs.manifest import MANIFEST
from deepinsert.envs.data.instructions import load_instructions
from deepinsert.envs.prompts import prompts_from

ROOT = Path(__file__).parents[3]
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


@pytest.fixture(scope="module")
def options(small_run: FinetuneOptions) -> FinetuneOptions:
    # Nine records: the second step of each epoch has one record, so one of two processes has only filling.
    return replace(small_run, fraction=0.09, batch_size=8, save_every=2, lora_dropout=0.0)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def start_two(options: FinetuneOptions, folder: Path, sharded: bool = False) -> subprocess.Popen[str]:
    """Start finetuning in two processes that communicate through gloo."""
    pickled = folder / "options"
    pickled.write_bytes(pickle.dumps(options))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), str(Path(__file__).parent / "training_child.py")]
    return subprocess.Popen(
        [*command, "sharded" if sharded else "copied", str(pickled)],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", **(SHARDED if sharded else {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_two(options: FinetuneOptions, folder: Path, sharded: bool = False) -> None:
    """Finetune in two processes to the end."""
    launcher = start_two(options, folder, sharded)
    try:
        _, errors = launcher.communicate(timeout=600)
    finally:
        kill_all(launcher)
    assert launcher.returncode == 0, errors[-4000:]


def kill_all(launcher: subprocess.Popen[str]) -> None:
    """Kill torchrun and its processes, which have sessions of their own."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(launcher.pid)
        for process in [parent, *parent.children(recursive=True)]:
            process.kill()
    launcher.wait()


def read_log(out: Path) -> torch.Tensor:
    """Return loss, learning rate and gradient norm of each step: (steps, 3)."""
    with (out / "train_loss.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return torch.tensor(
        [[float(row[name]) for name in ("loss", "learning_rate", "grad_norm")] for row in rows]
    )


def assert_same_training(one: Path, other: Path, atol: float = 1e-5) -> None:
    assert len(read_log(one)) == len(read_log(other)) == 5
    torch.testing.assert_close(read_log(one), read_log(other), atol=atol, rtol=1e-4)
    first, second = (load_file(out / "checkpoint" / "model.safetensors") for out in (one, other))
    assert first.keys() == second.keys()


def test_two_processes_give_the_losses_of_one(options: FinetuneOptions, tmp_path: Path) -> None:
    one = replace(options, method="lora", out=tmp_path / "one")
    two = replace(one, batch_size=options.batch_size // 2, out=tmp_path / "two")
    result = finetune.run(one)
    run_two(two, tmp_path)
    assert_same_training(one.out, two.out)
    assert result["global_batch_size"] == 8
    assert sorted(path.name for path in two.out.iterdir() if not path.name.startswith("events")) == sorted(
        path.name for path in one.out.iterdir() if not path.name.startswith("events")
    )
    assert len(list(two.out.glob("events*"))) == 1  # only the first process writes


@pytest.mark.parametrize(
    ("method", "sharded"),
    [
        ("full", False),
        pytest.param("full", True, marks=pytest.mark.slow),
        pytest.param("lora", True, marks=pytest.mark.slow),
    ],
)
def test_a_process_may_have_a_batch_without_image(
    options: FinetuneOptions, tmp_path: Path, method: str, sharded: bool
) -> None:
    """That process does not use the projector in this step, while the other trains it."""
    records = json.loads(options.data.read_text())
    subset = [record for record in records if "image" not in record][:4]
    subset += [record for record in records if "image" in record][:4]
    data = tmp_path / "subset.json"
    data.write_text(json.dumps(subset))
    one = replace(
        options,
        data=data,
        image_root=options.data.parent,
        method=method,
        fraction=1.0,
        batch_size=2,
        out=tmp_path / "one",
    )
    prompts = prompts_from(load_instructions(data, options.data.parent), per="record")
    order = PromptOrder(prompts, seed=one.seed, batch_size=1, processes=2).order(0)
    rounds = [{bool(prompts[row].images) for row in order[start : start + 2]} for start in (0, 2, 4, 6)]
    assert {True, False} in rounds
    finetune.run(one)
    two = replace(one, batch_size=1, out=tmp_path / "two")
    run_two(two, tmp_path, sharded)
    assert_same_training(one.out, two.out)


@pytest.mark.slow
def test_two_processes_draw_the_layers_of_one(options: FinetuneOptions, tmp_path: Path) -> None:
    one = replace(options, insert_layer="random", distillation=0.5, method="full", out=tmp_path / "one")
    two = replace(one, batch_size=options.batch_size // 2, out=tmp_path / "two")
    finetune.run(one)
    run_two(two, tmp_path)
    assert_same_training(one.out, two.out)


@pytest.mark.slow
def test_sharded_weights_have_one_layer_per_step(options: FinetuneOptions, tmp_path: Path) -> None:
    """Processes that ran different layers would wait for each other for ever."""
    run = replace(options, insert_layer="random", distillation=0.5, method="full", out=tmp_path / "run")
    run_two(replace(run, batch_size=options.batch_size // 2), tmp_path, sharded=True)
    assert len(read_log(run.out)) == 5
    assert json.loads((run.out / "result.json").read_text())["trained_layers"] == list(range(8))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_sharded_weights_give_the_losses_of_whole_ones(
    options: FinetuneOptions, tmp_path: Path, method: str
) -> None:
    """FSDP2 wraps each decoder layer."""
    one = replace(options, method=method, out=tmp_path / "one")
    two = replace(one, batch_size=options.batch_size // 2, out=tmp_path / "two")
    finetune.run(one)
    run_two(two, tmp_path, sharded=True)
    assert_same_training(one.out, two.out)
    first, second = (load_file(run.out / "checkpoint" / "model.safetensors") for run in (one, two))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=2e-3, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("sharded", [False, True], ids=["copied", "sharded"])
def test_killed_processes_end_with_the_same_weights(
    options: FinetuneOptions, tmp_path: Path, sharded: bool, method: str
) -> None:
    whole = replace(options, method=method, batch_size=4, lora_dropout=0.05, out=tmp_path / "whole")
    run_two(whole, tmp_path, sharded)
    run = replace(whole, out=tmp_path / "run")
    first = run.out / finetune.TRAINING / "checkpoint-2" / MANIFEST
    launcher = start_two(run, tmp_path, sharded)
    while not first.is_file():
        assert launcher.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.01)
    kill_all(launcher)
    assert not (run.out / "checkpoint").exists()
    run_two(run, tmp_path, sharded)
    assert torch.equal(read_log(whole.out), read_log(run.out)) and len(read_log(run.out)) == 5
    ends = [load_file(out / "checkpoint" / "model.safetensors") for out in (whole.out, run.out)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_rows_that_fill_a_batch_have_no_loss(tiny_backbone: Backbone, rendered_data: Path) -> None:
    rows = PromptDataset(prompts_from(load_instructions(rendered_data), per="record"))
    batch = collator(tiny_backbone, with_positions=True)([rows[0], rows[~1]])
    assert (batch["labels"][0] != -100).any() and (batch["labels"][1] == -100).all()
    assert batch["row_index"].tolist() == [0, 1]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_accelerate_accepts_the_configurations(name: str) -> None:
    path = ROOT / "scripts" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    types = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}
    assert config.distributed_type == types[name] and config.mixed_precision == "bf16"
    assert yaml.safe_load(path.read_text()).keys() <= vars(config).keys()
