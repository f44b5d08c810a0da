"""Manifests: the size and SHA-256 of every file of a folder. A folder without one is incomplete.

Importing this module does not import torch, so that folders can be checked quickly.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from .atomic_files import atomic_file, sync, to_json

MANIFEST = "manifest.json"
CARD = "README.md"


class CheckpointError(ValueError):
    """A checkpoint is damaged or incomplete, belongs to another training, or does not fit the model."""


def write_manifest(folder: Path, **facts: Any) -> None:
    """Declare `folder` complete: sync its files, then write their sizes and SHA-256 sums with `facts`.

    The model card is not listed, because evaluation adds its results to it later.
    """
    sums = {}
    for path in listed_files(folder):
        sync(path)
        sums[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync(path)
    with atomic_file(folder / MANIFEST) as temporary:
        temporary.write_text(manifest_text({**facts, "files": sums}), "utf-8")


def manifest_text(content: dict[str, Any]) -> str:
    """Return the manifest's JSON in one canonical form with a SHA-256 over itself: any changed byte shows."""
    body = {name: value for name, value in to_json(content).items() if name != "digest"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "digest": digest}, indent=2, allow_nan=False) + "\n"


def listed_files(folder: Path) -> list[Path]:
    """Return the files to list: all but the manifest, the model card, and hidden ones such as `.DS_Store`."""
    unlisted = (folder / MANIFEST, folder / CARD)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path not in unlisted]
    return [path for path in files if not path.name.startswith(".")]


def check_complete(folder: Path) -> dict[str, Any]:
    """Return the manifest of `folder` after checking that its files are exactly those that were written.

    A file that the manifest does not list counts as damage too, because loaders read any file that they find,
    such as another `adapter_model.bin` or an index of weights.

    Raises:
        CheckpointError: the folder is incomplete or damaged; the message names the file.
        OSError: a file cannot be read.
    """
    manifest = read_manifest(folder)
    entries = manifest["files"]
    paths = {path.relative_to(folder).as_posix(): path for path in listed_files(folder)}
    for name in sorted(entries.keys() | paths.keys()):
        if name not in paths:
            raise CheckpointError(f"{folder} is damaged: {name} is missing")
        if name not in entries:
            raise CheckpointError(f"{folder} is damaged: {name} was not written with it")
    # Sizes are compared first: a truncated file is detected without reading gigabytes.
    changed = [name for name, entry in entries.items() if paths[name].stat().st_size != entry["bytes"]]
    changed = changed or [name for name, entry in entries.items() if sha256(paths[name]) != entry["sha256"]]
    if changed:
        raise CheckpointError(f"{folder} is damaged: {changed[0]} is not what was written")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of `folder` without checking the files.

    Raises:
        CheckpointError: there is no manifest, or it is not as it was written.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
        manifest: dict[str, Any] = json.loads(text)
        if manifest_text(manifest).encode() != text or not manifest["files"]:
            raise ValueError
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not complete: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{folder} is damaged: {MANIFEST} is not what was written") from None
    return manifest


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
