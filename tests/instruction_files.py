"""Instruction files in LLaVA's JSON for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image


def human(value: Any) -> dict[str, Any]:
    return {"from": "human", "value": value}


def gpt(value: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": value}


def record(id: Any = "a", image: Any = "coco/1.png", *turns: Any) -> dict[str, Any]:
    """A record of one conversation, by default of one question about an image."""
    fields = {"id": id, "conversations": list(turns or (human("<image>\nWhat?"), gpt("A cat.")))}
    return fields if image is None else {**fields, "image": image}


def write_data(folder: Path, content: Any, name: str = "data.json") -> Path:
    """Write a data file: a text as it is (lone surrogates included), other content as JSON."""
    path = folder / name
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


def write_images(root: Path, *names: str) -> Path:
    """Write small images of these names below `root`, and return `root`."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), "red").save(root / name)
    return root
