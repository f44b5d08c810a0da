"""`deepinsert finetune`: a variant of the backbone whose multimodal tokens enter at a fixed layer.

The Trainer runs on the stock model with the insertion installed. The same command again continues a killed
run from its newest complete checkpoint and ends with the same weights, bit for bit.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from backbones import Backbone, load_backbone
from envs.prompts import Prompt, encode, prompts_from

from ..data import read_data
from ..option_checks import check
from ..options import FinetuneOptions
from ..runs import progress, read_result, replacing, save_figure, start_run, write_result
from .checkpoints import ResumableTrainer, replacing_folder
from .recipe import learning_rate, make_trainable, parameter_groups, training_arguments

TRAINING = "training"  # folder of the checkpoints that a killed run continues from
COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "seconds")


def run(options: FinetuneOptions) -> dict[str, Any]:
    """Finetune and write `checkpoint/` (stock model with processor), `adapter/` (LoRA) and `result.json`.

    Returns the result. A finished run is not repeated. Raises `ValueError` where the folder holds another
    run or an option cannot be used, `DatasetError` where the data cannot.
    """
    check_training(options)
    out = start_run(options)
    disable_progress_bar()  # one for each file written would tear the training's own apart
    training = out / TRAINING
    if (out / "result.json").is_file():
        shutil.rmtree(training, ignore_errors=True)  # left where a kill came between result and removal
        print(f"{out} is finished; nothing to do", file=sys.stderr)
        return read_result(out)
    set_seed(options.seed)
    backbone = load_backbone(
        options.backbone,
        insert_layer=options.insert_layer,
        device=options.device,
        dtype=training_dtype(options),
    )
    data = read_data(options)
    prompts = prompts_from(data, per="record")
    trainer = make_trainer(backbone, prompts, options)
    model: Any = trainer.model
    counted = {
        "trainable_parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }
    trainer.train(resume_from_checkpoint=True)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    adapter = save_variant(out, backbone, model)
    plot_loss(history, out / "train_loss.png", f"Finetuning at insert layer {options.insert_layer}")
    curve = [entry["loss"] for entry in history]
    last = curve[-max(1, len(curve) // 10) :]
    result = {
        "insert_layer": options.insert_layer,
        "method": options.method,
        "steps": options.steps,
        "train_loss": sum(last) / len(last),
        "checkpoint": str(out / "checkpoint"),
        "adapter": adapter,
        **counted,
        "learning_rate": learning_rate(options),
        "prompts": len(prompts),
        "skipped": [repr(record) for record in data.skipped],
        "seconds": sum(entry["seconds"] for entry in history),
        "train_loss_curve": curve,
    }
    write_result(out, result)
    shutil.rmtree(training, ignore_errors=True)
    print(
        f"Insert layer {options.insert_layer}: training loss {result['train_loss']:.3f} nats after "
        f"{options.steps} steps ({counted['trainable_parameters']:,} of {counted['parameters']:,} weights).\n"
        f"Variant: {result['checkpoint']}"
    )
    return result


def make_trainer(backbone: Backbone, prompts: Sequence[Prompt], options: FinetuneOptions) -> VariantTrainer:
    """A trainer of the backbone on the prompts, by the recipe, that logs to the run folder."""
    identity = {"backbone": backbone.fingerprint, "data": digest(prompts)}
    dtype = backbone.model.dtype

    def collate(batch: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        inputs = encode(backbone.processor, batch)
        return {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()
        }

    set_seed(options.seed)  # whatever was drawn so far, the adapter's first weights depend on the seed alone
    trainer = VariantTrainer(
        model=make_trainable(backbone.model, options),
        args=training_arguments(options, Path(options.out) / TRAINING, backbone.device),
        train_dataset=PromptDataset(prompts),
        data_collator=collate,
        options=options,
        identity=identity,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LossLog(Path(options.out)))
    return trainer


def check_training(options: FinetuneOptions) -> None:
    """Raises `ValueError` naming an option whose value cannot be used."""
    check(options)
    if options.learning_rate is not None and not 0 < options.learning_rate < float("inf"):
        raise ValueError(f"--learning-rate {options.learning_rate}: give a number above 0")
    if options.dtype == "float16":
        raise ValueError("--dtype float16 loses small gradients; finetune in bfloat16 or float32")


def training_dtype(options: FinetuneOptions) -> str:
    """Precision of the weights: on a GPU bfloat16 under LoRA, else float32, which small updates need."""
    if options.dtype != "auto":
        return options.dtype
    on_gpu = options.device.startswith("cuda") or (options.device == "auto" and torch.cuda.is_available())
    return "bfloat16" if on_gpu and options.method == "lora" else "float32"


def digest(prompts: Sequence[Prompt]) -> str:
    """16 hex digits that change when a prompt, the order, or the path of an image does."""
    total = hashlib.sha256()
    for prompt in prompts:
        images = [getattr(image, "path", "") for image in prompt.images]
        total.update(json.dumps([prompt.id, prompt.messages, images]).encode())
    return total.hexdigest()[:16]


class PromptDataset(Dataset[Prompt]):
    """Prompts as the Trainer's data loader takes them."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]


class VariantTrainer(ResumableTrainer):
    """The stock loss without a KV cache, the recipe's parameter groups, and the seconds of each step."""

    def __init__(self, *args: Any, options: FinetuneOptions, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options = options
        self.last_log = time.perf_counter()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args)
            trained: Any = self.model if model is None else model
            groups = parameter_groups(trained, self.options)
            self.optimizer = kind(groups, **settings)
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        now = time.perf_counter()
        super().log({**logs, "seconds": now - self.last_log}, start_time)
        self.last_log = now


class LossLog(TrainerCallback):
    """Progress on stderr, `train_loss.csv` and TensorBoard events.

    The trainer's state, which checkpoints hold, is the truth: a continued run rewrites the CSV from it and
    has TensorBoard forget the steps that are played again.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out / "train_loss.csv"
        self.writer: SummaryWriter | None = None
        self.bar: Iterator[int] = iter(())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with replacing(self.path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(
                [entry.get(name) for name in COLUMNS] for entry in state.log_history if "loss" in entry
            )
        self.writer = SummaryWriter(str(self.out), purge_step=state.global_step + 1)
        steps = range(state.global_step, state.max_steps)
        self.bar = progress(steps, "finetune", len(steps))
        next(self.bar, None)
        kwargs["model"].train()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        row = {**logs, "step": state.global_step}
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow([row.get(name) for name in COLUMNS])
        if self.writer is not None:
            for name in ("loss", "learning_rate", "grad_norm"):
                self.writer.add_scalar(f"train/{name}", row[name], state.global_step)
        next(self.bar, None)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.writer is not None:
            self.writer.close()


def save_variant(out: Path, backbone: Backbone, model: Any) -> str | None:
    """Write `adapter/` for LoRA, merge it, and write `checkpoint/`; returns the adapter's path, if any."""
    model.eval()
    adapter = None
    if isinstance(model, PeftModel):
        adapter = str(out / "adapter")
        with replacing_folder(out / "adapter") as folder:
            model.save_pretrained(str(folder))
        model = model.merge_and_unload()
    with replacing_folder(out / "checkpoint") as folder:
        replace(backbone, model=model).save_pretrained(folder)
    return adapter


def plot_loss(history: Sequence[dict[str, float]], path: Path, title: str) -> None:
    """Training loss by step, with its running mean over a tenth of the steps."""
    from matplotlib.figure import Figure

    steps = [entry["step"] for entry in history]
    losses = [entry["loss"] for entry in history]
    window = max(1, len(losses) // 10)
    means = [
        sum(losses[max(0, end - window) : end]) / len(losses[max(0, end - window) : end])
        for end in range(1, len(losses) + 1)
    ]
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="0.75", linewidth=1, label="each step")
    axes.plot(steps, means, color="tab:blue", label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="loss on answers (nats)", title=title)
    axes.set_ylim(0, 1.05 * max(losses))
    axes.legend(frameon=False)
    save_figure(figure, path)
