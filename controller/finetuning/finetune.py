"""`deepinsert finetune`: a variant of the backbone whose multimodal tokens enter at a fixed layer.

The Trainer runs on the stock model with the insertion installed. The same command again continues a killed
run from its newest complete checkpoint and ends with the same weights, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from deepinsert.backbones import Backbone
from deepinsert.controller.option_checks import check, flag
from deepinsert.controller.options import FinetuneOptions
from deepinsert.controller.prompt_selection import read_data
from deepinsert.controller.runs.atomic_files import save_figure
from deepinsert.controller.runs.folder import read_result, start_run, write_result
from deepinsert.envs.prompts import Prompt, prompts_from

from .batches import PromptDataset, collator
from .checkpoints import TRAINING, continuable
from .depths import make_depths, record_depths, trained_layers
from .publish import publish
from .recipe import (
    accumulation,
    count_parameters,
    learning_rate,
    make_trainable,
    process_count,
    projector_learning_rate,
    reporters,
    training_arguments,
)
from .saving import remove_leftovers, save_variant, write_cards
from .trainable_backbone import (
    check_bitsandbytes,
    load,
    saved_dtype,
    trained_model,
    training_device,
    unquantised,
)
from .variant_trainer import LossLog, VariantTrainer


@continuable
def run(options: FinetuneOptions) -> dict[str, Any]:
    """Finetune and write `checkpoint/` (stock model with processor), `adapter/` (LoRA) and `result.json`.

    Returns the result. A finished run is not repeated. Of several processes the first alone writes, and the
    others return an empty result. Raises `ValueError` where the folder holds another run or an option cannot
    be used, `DatasetError` where the data cannot.
    """
    check_training(options)
    out, leads = Path(options.out), os.environ.get("RANK", "0") == "0"
    if leads:
        start_run(options)
    disable_progress_bar()  # one for each file written would tear the training's own apart
    if (out / "result.json").is_file():
        return finished(options) if leads else {}
    set_seed(options.seed)
    backbone = load(options)
    data = read_data(options)
    prompts = prompts_from(data, per="record")
    trainer = make_trainer(backbone, prompts, options)
    model: Any = trainer.model
    trainable, parameters = count_parameters(model)
    counted = {"trainable_parameters": trainable, "parameters": parameters}
    trainer.train(resume_from_checkpoint=True)
    model = trained_model(trainer, options)
    if not leads:
        return {}
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    adapter = save_variant(out, backbone, model, unquantised(options), saved_dtype(options))
    plot_loss(history, out / "train_loss.png", f"Finetuning at insert layer {options.insert_layer}")
    result = {
        "insert_layer": backbone.insert_layer,
        **trained_layers(backbone),
        "method": options.method,
        "steps": trainer.state.max_steps,
        "global_batch_size": trainer.get_total_train_batch_size(trainer.args),
        **losses_of(history),
        "checkpoint": str(out / "checkpoint"),
        "adapter": adapter,
        **counted,
        "learning_rate": learning_rate(options),
        "projector_learning_rate": projector_learning_rate(options),
        "prompts": len(prompts),
        "skipped": [repr(record) for record in data.skipped],
    }
    write_cards(options, backbone, data, result)
    return finish(options, result)


def losses_of(history: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The loss of each step, its mean over the last tenth of them, and how long they took."""
    curve = [entry["loss"] for entry in history]
    last = curve[-max(1, len(curve) // 10) :]
    return {
        "train_loss": sum(last) / len(last),
        "seconds": sum(entry["seconds"] for entry in history),
        "train_loss_curve": curve,
    }


def finish(options: FinetuneOptions, result: dict[str, Any]) -> dict[str, Any]:
    """Write the result, remove the checkpoints of the training, and say what there is."""
    out = Path(options.out)
    write_result(out, result)
    shutil.rmtree(out / TRAINING, ignore_errors=True)
    print(
        f"Insert layer {options.insert_layer}: training loss {result['train_loss']:.3f} nats after "
        f"{result['steps']} steps ({result['trainable_parameters']:,} of {result['parameters']:,} weights).\n"
        f"Variant: {result['checkpoint']}"
    )
    if options.push_to_hub:
        print(f"Published: {publish(options)}")
    return result


def finished(options: FinetuneOptions) -> dict[str, Any]:
    """The result of a run that was finished before, published where that is asked for."""
    out = Path(options.out)
    shutil.rmtree(out / TRAINING, ignore_errors=True)  # left where a kill came between result and removal
    remove_leftovers(out)
    print(f"{out} is finished; nothing to train", file=sys.stderr)
    if options.push_to_hub:
        print(f"Published: {publish(options)}")
    return read_result(out)


def make_trainer(backbone: Backbone, prompts: Sequence[Prompt], options: FinetuneOptions) -> VariantTrainer:
    """A trainer of the backbone on the prompts, by the recipe, that logs to the run folder."""
    depths = make_depths(options, backbone, prompts)
    identity = {"backbone": backbone.fingerprint, "data": digest(prompts)}
    identity |= depths.identity if depths else {}
    record_depths(backbone, depths)
    idle = backbone.insert_layer == backbone.num_layers or not all(prompt.images for prompt in prompts)
    set_seed(options.seed)  # whatever was drawn so far, the adapter's first weights depend on the seed alone
    trainer = VariantTrainer(
        model=make_trainable(backbone.model, options),
        args=training_arguments(options, Path(options.out) / TRAINING, training_device(options), idle),
        train_dataset=PromptDataset(prompts),
        data_collator=collator(backbone, placed=depths is not None),
        projector_learning_rate=projector_learning_rate(options),
        group_by=options.group_by,
        depths=depths,
        identity=identity,
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.args.process_index == 0:
        trainer.add_callback(LossLog(Path(options.out)))
    else:
        torch.manual_seed(options.seed + trainer.args.process_index)  # each drops other inputs
    return trainer


def check_training(options: FinetuneOptions) -> None:
    """Raises `ValueError` naming an option whose value cannot be used."""
    check(options)
    for name in ("learning_rate", "projector_learning_rate", "epochs"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{flag(name)} {value}: give a number above 0")
    if not 0 <= options.lora_dropout < 1:
        raise ValueError(f"--lora-dropout {options.lora_dropout}: give a share from 0 to below 1")
    if options.global_batch_size is not None and options.gradient_accumulation is not None:
        raise ValueError(
            f"--gradient-accumulation {options.gradient_accumulation} and --global-batch-size "
            f"{options.global_batch_size} exclude each other: give one of them"
        )
    accumulation(options, process_count())
    reporters(options.report_to)
    if options.dtype == "float16":
        raise ValueError("--dtype float16 loses small gradients; finetune in bfloat16 or float32")
    if options.method == "qlora":
        check_bitsandbytes()


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
