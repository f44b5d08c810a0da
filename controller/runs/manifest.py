"""Manifests: every file of a folder with its SHA-256, written last: the folder is whole or does not count.

Without torch, so that a folder can be judged quickly.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from .folder import replacing, sync, to_json

MANIFEST = "manifest.json"
CARD = "README.md"


class CheckpointError(ValueError):
    """A checkpoint that is spoilt, belongs to another training, or whose weights do not fit the model."""


def write_manifest(folder: Path, **facts: Any) -> None:
    """Declare `folder` complete: sync its files, then write their sizes and SHA-256 sums with `facts`.

    The model card is left out: evaluation adds its results to it later.
    """
    sums = {}
    for path in listed_files(folder):
        sync(path)
        sums[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync(path)
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(manifest_text({**facts, "files": sums}), "utf-8")


def manifest_text(content: dict[str, Any]) -> str:
    """The manifest's only spelling: JSON with a SHA-256 over itself, so that any changed byte shows."""
    body = {name: value for name, value in to_json(content).items() if name != "digest"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "digest": digest}, indent=2, allow_nan=False) + "\n"


def listed_files(folder: Path) -> list[Path]:
    """What a manifest lists: every file but itself, the model card, and hidden ones such as `.DS_Store`."""
    left_out = (folder / MANIFEST, folder / CARD)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path not in left_out]
    return [path for path in files if not path.name.startswith(".")]


def check_whole(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose files are those that were written, all of them and no other.

    A file that the manifest does not list counts as damage too: loaders take what they find, such as another
    `adapter_model.bin` or an index of weights. Raises `CheckpointError` naming what is wrong, and `OSError`
    where a file cannot be read.
    """
    listed = manifest_files(folder)
    found = {path.relative_to(folder).as_posix(): path for path in listed_files(folder)}
    for name in sorted(listed["files"].keys() | found.keys()):
        if name not in found:
            raise CheckpointError(f"{folder} is spoilt: {name} is missing")
        if name not in listed["files"]:
            raise CheckpointError(f"{folder} is spoilt: {name} was not written with it")
    # Sizes first: a cut file is found without reading gigabytes.
    changed = [
        name for name, entry in listed["files"].items() if found[name].stat().st_size != entry["bytes"]
    ]
    changed = changed or [
        name for name, entry in listed["files"].items() if sha256(found[name]) != entry["sha256"]
    ]
    if changed:
        raise CheckpointError(f"{folder} is spoilt: {changed[0]} is not what was written")
    return listed


def manifest_files(folder: Path) -> dict[str, Any]:
    """The manifest as it was written, whatever the files are. Raises `CheckpointError` for any other."""
    try:
        text = (folder / MANIFEST).read_bytes()
        manifest = json.loads(text)
        if manifest_text(manifest).encode() != text or not manifest["files"]:
            raise ValueError
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not complete: it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{folder} is spoilt: {MANIFEST} is not what was written") from None
    return manifest


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
