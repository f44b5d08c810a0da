"""Writing a finetuned variant as what others load: an adapter, and an ordinary checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from backbones import Backbone

from .checkpoints import replacing_folder


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
