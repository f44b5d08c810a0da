"""Writing a finetuned variant as what others load: an adapter and an ordinary checkpoint, with cards."""

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
from deepinsert.controller.runs.atomic_files import write_json
from deepinsert.controller.runs.machine import package_versions
from deepinsert.controller.runs.manifest import sha256, write_manifest
from deepinsert.envs.data.instructions import InstructionData

from .checkpoints import atomic_folder
from .model_card import Facts, write_card


def save_variant(
    out: Path,
    backbone: Backbone,
    model: Any,
    ordinary: Callable[[], Backbone] | None = None,
    dtype: torch.dtype = torch.float32,
) -> str | None:
    """Write `adapter/` for LoRA, merge it, and write `checkpoint/` in `dtype`; returns the adapter's path, if
    any.

    Each is whole or absent, with a manifest. The insert layer travels in the checkpoint's `config.json` and
    beside the adapter in `deepinsert.json`, which `load_backbone` reads. `ordinary` loads the backbone that a
    quantised model's adapter is merged into: what 4 bits have lost would stay lost.
    """
    remove_leftovers(out)
    model.eval()
    adapter = None
    if isinstance(model, PeftModel):
        adapter = str(out / "adapter")
        with atomic_folder(out / "adapter") as folder:
            model.save_pretrained(str(folder))
            (folder / PEFT_CARD).unlink(missing_ok=True)  # PEFT's own is a form to fill in
            base = Path(backbone.name)
            name = str(base.resolve()) if base.is_dir() else backbone.name
            facts = getattr(backbone.model.config, CONFIG_KEY)
            write_json(folder / ADAPTER_FACTS, {**facts, "backbone": name})
            write_manifest(folder)
        if ordinary is not None:
            backbone = ordinary()
            model = PeftModel.from_pretrained(backbone.model, adapter)
        model = model.merge_and_unload()
    with atomic_folder(out / "checkpoint") as folder:
        replace(backbone, model=model.to(dtype)).save_pretrained(folder)
        write_manifest(folder)
    return adapter


def remove_leftovers(out: Path) -> None:
    """Remove files that a kill left half written in the run folder."""
    for path in out.glob(".*.tmp"):
        if path.is_file():
            path.unlink()


def write_cards(
    options: FinetuneOptions, backbone: Backbone, data: InstructionData, result: dict[str, Any]
) -> None:
    """Write the model cards of `checkpoint/` and `adapter/`; `result` is what result.json will hold."""
    out = Path(options.out)
    facts = Facts(
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
