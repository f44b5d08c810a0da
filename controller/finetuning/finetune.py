"""`deepinsert finetune`: trains a variant whose multimodal tokens enter at a fixed insert layer.

The Trainer runs on the stock model with the insertion installed. The same command continues a killed run from
its newest complete checkpoint and ends with bit-identical weights.
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
from transformers.utils import logging as transformers_logging

from deepinsert.backbones import Backbone
from deepinsert.controller.option_checks import check, flag
from deepinsert.controller.options import FinetuneOptions
from deepinsert.controller.prompt_selection import read_data
from deepinsert.controller.runs.folder import read_result, start_run, write_result
from deepinsert.controller.runs.processes import Processes
from deepinsert.envs.data.instructions import InstructionData
from deepinsert.envs.prompts import Prompt, prompts_from

from .batches import PromptDataset, collator
from .checkpoints import TRAINING, explains_how_to_continue
from .depths import make_depths, record_depths, recorded_layers
from .loss_log import LossLog, logged_losses, plot_loss, summarise_losses
from .publish import publish
from .recipe import (
    accumulation,
    count_parameters,
    learning_rate,
    make_trainable,
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
    unquantised_loader,
)
from .variant_trainer import VariantTrainer


@explains_how_to_continue
def run(options: FinetuneOptions) -> dict[str, Any]:
    """Finetune and write `checkpoint/` (stock model with processor), `adapter/` (LoRA) and `result.json`.

    A finished run is not repeated. Of several processes only the first writes.

    Returns:
        The content of `result.json`; it is empty in all processes but the first.

    Raises:
        ValueError: the folder holds another run, or an option cannot be used.
        DatasetError: the data cannot be used.
        StorageError: the folder cannot be written.
    """
    check_training(options)
    out, is_first = Path(options.out), Processes.from_environment().is_first
    if is_first:
        start_run(options)
    disable_progress_bar: Any = transformers_logging.disable_progress_bar
    disable_progress_bar()  # bars of single files would break up the bar of the training
    if (out / "result.json").is_file():
        return reuse_result(options) if is_first else {}
    set_seed(options.seed)
    backbone = load(options)
    data = read_data(options)
    prompts = prompts_from(data, per="record")
    trainer = make_trainer(backbone, prompts, options)
    model: Any = trainer.model
    parameter_counts = count_parameters(model)
    trainer.train(resume_from_checkpoint=True)
    model = trained_model(trainer, options)
    if not is_first:
        return {}
    adapter = save_variant(out, backbone, model, unquantised_loader(options), saved_dtype(options))
    result = make_result(options, trainer, backbone, data, adapter, parameter_counts)
    plot_loss(
        logged_losses(trainer), out / "train_loss.png", f"Finetuning at insert layer {options.insert_layer}"
    )
    write_cards(options, backbone, data, result)
    return finish(options, result)


def check_training(options: FinetuneOptions) -> None:
    """Raise `ValueError` naming an option whose value cannot be used."""
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
    accumulation(options, Processes.from_environment().world_size)
    reporters(options.report_to)
    if options.dtype == "float16":
        raise ValueError("--dtype float16 loses small gradients; finetune in bfloat16 or float32")
    if options.method == "qlora":
        check_bitsandbytes()


def make_trainer(backbone: Backbone, prompts: Sequence[Prompt], options: FinetuneOptions) -> VariantTrainer:
    """Return a trainer of the backbone on the prompts that follows the recipe and logs to the run folder."""
    depths = make_depths(options, backbone, prompts)
    identity = {"backbone": backbone.fingerprint, "data": prompts_digest(prompts)}
    identity |= depths.identity if depths else {}
    record_depths(backbone, depths)
    is_idle = backbone.insert_layer == backbone.num_layers or not all(prompt.images for prompt in prompts)
    set_seed(options.seed)  # the adapter's initial weights depend only on the seed, not on earlier draws
    trainer = VariantTrainer(
        model=make_trainable(backbone.model, options),
        args=training_arguments(options, Path(options.out) / TRAINING, training_device(options), is_idle),
        train_dataset=PromptDataset(prompts),
        data_collator=collator(backbone, with_positions=depths is not None),
        projector_learning_rate=projector_learning_rate(options),
        group_by=options.group_by,
        depths=depths,
        identity=identity,
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.args.process_index == 0:
        trainer.add_callback(LossLog(Path(options.out)))
    else:
        torch.manual_seed(options.seed + trainer.args.process_index)  # a different dropout seed on each rank
    return trainer


def make_result(
    options: FinetuneOptions,
    trainer: VariantTrainer,
    backbone: Backbone,
    data: InstructionData,
    adapter: str | None,
    parameter_counts: tuple[int, int],
) -> dict[str, Any]:
    """Return the content of `result.json`.

    Args:
        options: the options of the command.
        trainer: the trainer after training.
        backbone: the backbone that was finetuned.
        data: the records that it was finetuned on.
        adapter: the path of the adapter, or None without LoRA.
        parameter_counts: the numbers of trainable weights and of all weights.
    """
    prompts: Any = trainer.train_dataset
    return {
        "insert_layer": backbone.insert_layer,
        **recorded_layers(backbone),
        "method": options.method,
        "steps": trainer.state.max_steps,
        "global_batch_size": trainer.get_total_train_batch_size(trainer.args),
        **summarise_losses(logged_losses(trainer)),
        "checkpoint": str(Path(options.out) / "checkpoint"),
        "adapter": adapter,
        "trainable_parameters": parameter_counts[0],
        "parameters": parameter_counts[1],
        "learning_rate": learning_rate(options),
        "projector_learning_rate": projector_learning_rate(options),
        "prompts": len(prompts),
        "skipped": [repr(record) for record in data.skipped],
    }


def finish(options: FinetuneOptions, result: dict[str, Any]) -> dict[str, Any]:
    """Write the result, remove the checkpoints of the training, print a summary, and publish if requested."""
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


def reuse_result(options: FinetuneOptions) -> dict[str, Any]:
    """Return the result of a finished run, after publishing it if requested."""
    out = Path(options.out)
    shutil.rmtree(out / TRAINING, ignore_errors=True)  # a kill may have come before their removal
    remove_leftovers(out)
    print(f"{out} is finished; nothing to train", file=sys.stderr)
    if options.push_to_hub:
        print(f"Published: {publish(options)}")
    return read_result(out)


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Return 16 hex digits that change with a prompt, the order of the prompts, or the path of an image."""
    digest = hashlib.sha256()
    for prompt in prompts:
        images = [getattr(image, "path", "") for image in prompt.images]
        digest.update(json.dumps([prompt.id, prompt.messages, images]).encode())
    return digest.hexdigest()[:16]
