"""Reward tables on disk: Parquet files with checksums, in a folder that several processes may add to.

A shard is one file with a row per prompt and insert layer. A file's name ends in its own hash, and the file
is whole or absent. So no process needs a lock, and a crash leaves nothing behind that could be read as part
of a table. Programs that read the folder as one Parquet data set skip names that begin with an underscore.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MANIFEST = "_manifest.json"
FORMAT = 1
SHARD = re.compile(r"(losses-\d{5,}|added)-([0-9a-f]{16})\.parquet")
PROMPTS = re.compile(r"(_prompts)-([0-9a-f]{16})\.parquet")
METADATA = b"deepinsert"

PROMPT_FIELDS = [
    pa.field("prompt_key", pa.string(), nullable=False),
    pa.field("prompt_id", pa.string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("image_key", pa.string(), nullable=False),
    pa.field("group_key", pa.string(), nullable=False),
]
PROMPT_COLUMNS = [field.name for field in PROMPT_FIELDS]
PROMPT_SCHEMA = pa.schema(PROMPT_FIELDS)
SCHEMA = pa.schema(
    [
        *PROMPT_FIELDS,
        pa.field("insert_layer", pa.int32(), nullable=False),
        pa.field("loss", pa.float64(), nullable=False),
        pa.field("flops", pa.float64()),
        pa.field("stock_flops", pa.float64()),
        pa.field("first_token", pa.int32()),
        pa.field("greedy", pa.bool_()),
        pa.field("correct", pa.bool_()),
        pa.field("agrees", pa.bool_()),
    ]
)
"""Columns of a shard. `loss` is in nats. `flops` are those of the prefill at this layer, `stock_flops` at
layer 0. `first_token` is the most probable first token of the answer; `greedy` says whether every token of
the answer is the most probable one, `agrees` whether the first token is that of layer 0. `group_key` is equal
for prompts that were computed together."""


class RewardFiles:
    """The files of a reward table's folder.

    Args:
        folder: the folder.
        origin: what the losses were computed with, which every file repeats; by default it is read from the
            folder.

    Raises:
        ValueError: if the folder has another origin, or if `origin` is None and the folder has none.
    """

    def __init__(self, folder: str | Path, origin: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self._shards_read: set[str] = set()
        self.origin = {"format": FORMAT, **(self._stored_origin() if origin is None else origin)}
        manifest = self.manifest()
        self._listed: dict[str, Any] = {}
        if manifest is not None:
            self._check_origin(self.folder / MANIFEST, manifest["origin"])
            self._listed = manifest["files"]

    def shards(self) -> list[str]:
        """Return the names of the shards, in order.

        Raises:
            ValueError: if the folder contains a file that belongs to no table.
        """
        return [name for name in self._names() if SHARD.fullmatch(name)]

    def prompt_lists(self) -> list[pa.Table]:
        """Return the prompts of each data set in the folder, in their order, the largest data set first."""
        lists = [self._read(name, PROMPT_SCHEMA) for name in self._names() if PROMPTS.fullmatch(name)]
        return sorted(lists, key=lambda prompts: -prompts.num_rows)

    def read_new(self) -> Iterator[pa.Table]:
        """Yield the shards that have not been read or written here, in order, after a check of their hash.

        Raises:
            ValueError: if a file is damaged or has another origin; the message names the file.
        """
        for name in self.shards():
            if name not in self._shards_read:
                self._shards_read.add(name)
                yield self._read(name, SCHEMA)

    def write_shard(self, kind: str, columns: Mapping[str, Any]) -> str:
        """Add a shard and return its file name; `kind` is "added" or "losses-" and a number."""
        name = self._write(kind, columns, SCHEMA)
        self._shards_read.add(name)
        return name

    def write_prompts(self, columns: Mapping[str, Sequence[str]]) -> str:
        """Add the list of a data set's prompts, in their order, and return its file name."""
        return self._write("_prompts", columns, PROMPT_SCHEMA)

    def missing(self) -> list[str]:
        """Return the names of files that the manifest lists but the folder lacks."""
        listed = (self.manifest() or {"files": {}})["files"]
        return [name for name in sorted(listed) if not (self.folder / name).is_file()]

    def write_manifest(self) -> None:
        """Write the manifest: every file with its sha256. Every process writes the same content."""
        listed = (self.manifest() or {"files": {}})["files"]
        files = {}
        for name in self._names():
            path = self.folder / name
            files[name] = listed.get(name)
            if files[name] is None or files[name]["bytes"] != path.stat().st_size:
                content = path.read_bytes()
                files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        text = json.dumps({"origin": self.origin, "files": files}, indent=2) + "\n"
        write_file(self.folder / MANIFEST, text.encode())

    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest's `origin` and `files` (sha256 and bytes per name); None if there is none yet.

        Raises:
            ValueError: if the manifest is damaged.
        """
        path = self.folder / MANIFEST
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_bytes())
            files = {
                str(name): {"sha256": str(entry["sha256"]), "bytes": int(entry["bytes"])}
                for name, entry in content["files"].items()
            }
            return {"origin": dict(content["origin"]), "files": files}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); remove it, the table's other files do not need it"
            ) from error

    def _names(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        names = []
        for entry in os.scandir(self.folder):
            if entry.name.startswith(".") or entry.name == MANIFEST:
                continue
            if not (entry.is_file() and (SHARD.fullmatch(entry.name) or PROMPTS.fullmatch(entry.name))):
                raise ValueError(
                    f"{self.folder / entry.name} is no file of a reward table; remove it, or choose another "
                    "folder for the table"
                )
            names.append(entry.name)
        return sorted(names)

    def _read(self, name: str, schema: pa.Schema) -> pa.Table:
        """Read a file; raise `ValueError` unless its hash, columns and origin are right."""
        path = self.folder / name
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        listed = self._listed.get(name, {"sha256": sha256})["sha256"]
        if sha256[:16] != Path(name).stem[-16:] or sha256 != listed:
            raise ValueError(
                f"{path} is damaged: its content does not match its name or {MANIFEST}; remove it, and its "
                "losses are computed again"
            )
        try:
            table = pq.read_table(pa.BufferReader(content), read_dictionary=PROMPT_COLUMNS)
            origin = dict(json.loads((table.schema.metadata or {})[METADATA]))
            table = table.select(schema.names)
            _check_columns(table, schema)
        except (pa.ArrowException, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ValueError(
                f"{path} is no shard of a reward table ({' '.join(str(error).split())}); remove it, and its "
                "losses are computed again"
            ) from error
        self._check_origin(path, origin)
        return table

    def _write(self, kind: str, columns: Mapping[str, Any], schema: pa.Schema) -> str:
        metadata = {METADATA: json.dumps(self.origin, sort_keys=True)}
        arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
        table = pa.table(arrays, schema=schema.with_metadata(metadata))
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd", use_dictionary=PROMPT_COLUMNS)
        content = buffer.getvalue().to_pybytes()
        name = f"{kind}-{hashlib.sha256(content).hexdigest()[:16]}.parquet"
        if not (self.folder / name).is_file():
            write_file(self.folder / name, content)
        return name

    def _stored_origin(self) -> dict[str, Any]:
        """Return the origin that the folder's files record."""
        manifest = self.manifest()
        if manifest is not None:
            return dict(manifest["origin"])
        names = self._names()
        for name in names:
            try:
                origin = json.loads(pq.read_schema(self.folder / name).metadata[METADATA])
            except (pa.ArrowException, ValueError, KeyError, TypeError, OSError):
                continue  # `_read` reports what is wrong with it
            if isinstance(origin, dict):
                return origin
        reason = f"{names[0]} is damaged" if names else "it is empty"
        raise ValueError(f"{self.folder} holds no reward table ({reason}): give one that a sweep has written")

    def _check_origin(self, path: Path, origin: Mapping[str, Any]) -> None:
        if origin != self.origin:
            keys = [key for key in self.origin if origin.get(key) != self.origin[key]]
            differences = "; ".join(f"{key} {origin.get(key)!r}, here {self.origin[key]!r}" for key in keys)
            raise ValueError(
                f"{path} was computed with another backbone or precision ({differences}); choose another "
                "folder for this table"
            )


def _check_columns(table: pa.Table, schema: pa.Schema) -> None:
    """Raise `TypeError` or `ValueError` unless a file's columns have the right types and values."""
    for field, column in zip(schema, table.columns, strict=True):
        is_name = field.name in PROMPT_COLUMNS
        is_encoded = is_name and pa.types.is_dictionary(column.type)
        value_type = column.type.value_type if is_encoded else column.type
        if value_type != field.type or is_encoded != is_name:
            raise TypeError(f"column {field.name} is {value_type}, not {field.type}")
    if "loss" in schema.names and not pc.all(pc.is_finite(table["loss"])).as_py():
        raise ValueError("a loss that is not finite")
    required = [field.name for field in schema if not field.nullable]
    if any(table[name].null_count for name in required):
        raise ValueError(f"empty cells in {', '.join(required)}")


def write_file(path: Path, content: bytes) -> None:
    """Write a file that is whole or absent: it is synced under a temporary name and then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    entries = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(entries)
    finally:
        os.close(entries)
