"""Saves a finetuned variant as an ordinary checkpoint, after LoRA also as an adapter, with model cards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from deepinsert.backbones import Backbone
from deepinsert.backbones.compat.peft import CARD as PEFT_CARD
from deepinsert.backbones.loading import ADAPTER_FACTS
from deepinsert.backbones.mechanism.insertion import CONFIG_KEY
from deepinsert.controller.options import FinetuneOptions
from deepinsert.controller.runs.atomic_files import atomic_folder, write_json
from deepinsert.controller.runs.machine import package_versions
from deepinsert.controller.runs.manifest import sha256, write_manifest
from deepinsert.envs.data.instructions import InstructionData

from .model_card import CardFacts, write_card


def save_variant(
    out: Path,
    backbone: Backbone,
    model: Any,
    load_unquantised: Callable[[], Backbone] | None = None,
    dtype: torch.dtype = torch.float32,
) -> str | None:
    """Write `adapter/` after LoRA, merge the adapter, and write `checkpoint/`.

    Each folder is complete or absent, and has a manifest. The insert layer is part of the checkpoint's
    `config.json` and of `deepinsert.json` beside the adapter; `load_backbone` reads both.

    Args:
        out: the run folder.
        backbone: the backbone that was finetuned.
        model: the trained model, a `PeftModel` after LoRA.
        load_unquantised: loads the backbone to merge the adapter into, if training has quantised it; the
            rounding of 4 bits must not reach the checkpoint.
        dtype: the dtype of the checkpoint's weights.

    Returns:
        The path of the adapter, or None without LoRA.
    """
    remove_leftovers(out)
    model.eval()
    adapter = None
    if isinstance(model, PeftModel):
        adapter = str(out / "adapter")
        save_adapter(out / "adapter", backbone, model)
        if load_unquantised is not None:
            backbone = load_unquantised()
            model = PeftModel.from_pretrained(backbone.model, adapter)
        model = model.merge_and_unload()
    with atomic_folder(out / "checkpoint") as folder:
        replace(backbone, model=model.to(dtype)).save_pretrained(folder)
        write_manifest(folder)
    return adapter


def save_adapter(path: Path, backbone: Backbone, model: PeftModel) -> None:
    """Write the adapter of `model` to the folder `path`, with its insert layer and its backbone."""
    with atomic_folder(path) as folder:
        model.save_pretrained(str(folder))
        (folder / PEFT_CARD).unlink(missing_ok=True)  # PEFT's card is an empty form
        base = Path(backbone.name)
        name = str(base.resolve()) if base.is_dir() else backbone.name
        facts = getattr(backbone.model.config, CONFIG_KEY)
        write_json(folder / ADAPTER_FACTS, {**facts, "backbone": name})
        write_manifest(folder)


def remove_leftovers(out: Path) -> None:
    """Remove the temporary files that a kill has left in the run folder."""
    for path in out.glob(".*.tmp"):
        if path.is_file():
            path.unlink()


def write_cards(
    options: FinetuneOptions, backbone: Backbone, data: InstructionData, result: dict[str, Any]
) -> None:
    """Write the model cards of `checkpoint/` and `adapter/`.

    Args:
        options: the options of the finetuning.
        backbone: the backbone that was finetuned.
        data: the records that it was finetuned on.
        result: the content of `result.json`.
    """
    out = Path(options.out)
    facts = CardFacts(
        name=out.resolve().name,
        backbone=options.backbone,
        insert_layer=options.insert_layer,
        num_layers=backbone.num_layers,
        data_name=data.path.name,
        data_sha256=sha256(data.path),
        sources=Counter(record.source for record in data),
        options=asdict(options),
        result=result,
        versions=package_versions(),
    )
    write_card(out / "checkpoint", facts)
    if (out / "adapter").is_dir():
        write_card(out / "adapter", facts, adapter=True)
