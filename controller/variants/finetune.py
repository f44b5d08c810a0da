"""`deepinsert finetune`: a variant of the backbone whose multimodal tokens enter at a fixed layer.

The Trainer runs on the stock model with the insertion installed. The same command again continues a killed
run from its newest complete checkpoint and ends with the same weights, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from backbones import Backbone, load_backbone
from envs.prompts import Prompt, prompts_from

from ..data import read_data
from ..option_checks import check
from ..options import FinetuneOptions
from ..runs import read_result, save_figure, start_run, write_result
from .batches import PromptDataset, collator
from .checkpoints import TRAINING, continuable
from .depths import fixed_layer, make_depths, record_depths, trained_layers
from .publish import publish
from .recipe import learning_rate, make_trainable, training_arguments
from .saving import save_variant, write_cards
from .trainer import LossLog, VariantTrainer


@continuable
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
        print(f"{out} is finished; nothing to train", file=sys.stderr)
        if options.push_to_hub:
            print(f"Published: {publish(options)}")
        return read_result(out)
    set_seed(options.seed)
    backbone = load_backbone(
        options.backbone,
        insert_layer=fixed_layer(options),
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
        "insert_layer": backbone.insert_layer,
        **trained_layers(backbone),
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
    write_cards(options, backbone, data, result)
    write_result(out, result)
    shutil.rmtree(training, ignore_errors=True)
    print(
        f"Insert layer {options.insert_layer}: training loss {result['train_loss']:.3f} nats after "
        f"{options.steps} steps ({counted['trainable_parameters']:,} of {counted['parameters']:,} weights).\n"
        f"Variant: {result['checkpoint']}"
    )
    if options.push_to_hub:
        print(f"Published: {publish(options)}")
    return result


def make_trainer(backbone: Backbone, prompts: Sequence[Prompt], options: FinetuneOptions) -> VariantTrainer:
    """A trainer of the backbone on the prompts, by the recipe, that logs to the run folder."""
    depths = make_depths(options, backbone, prompts)
    identity = {"backbone": backbone.fingerprint, "data": digest(prompts)}
    identity |= depths.identity if depths else {}
    record_depths(backbone, depths)
    set_seed(options.seed)  # whatever was drawn so far, the adapter's first weights depend on the seed alone
    trainer = VariantTrainer(
        model=make_trainable(backbone.model, options),
        args=training_arguments(options, Path(options.out) / TRAINING, backbone.device),
        train_dataset=PromptDataset(prompts, placed=depths is not None),
        data_collator=collator(backbone, placed=depths is not None),
        options=options,
        depths=depths,
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
