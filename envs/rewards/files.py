"""Reward tables on disk: Parquet files that verify themselves, in a folder that any process may add to.

Each file is one shard: a row for each prompt and insert layer. A file's name ends in its own hash and it
appears whole or not at all, so no process needs a lock, and what a crash leaves behind is never taken for a
table. Names that begin with an underscore are left out by what reads the folder as one Parquet data set.
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
NAMES = [field.name for field in PROMPT_FIELDS]
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
"""Columns of a shard. `loss` is in nats; `flops` of the prefill at this layer, `stock_flops` at layer 0;
`first_token` the most probable one; `greedy` whether every token of the answer is; `agrees` whether the first
token is that of layer 0; `group_key` names the prompts that were computed together."""


class RewardFiles:
    """The files of a reward table's folder.

    `origin` says what the losses were computed with, and every file repeats it. It is read from the folder
    where it is not given; `ValueError` where the folder's is another, or where there is none.
    """

    def __init__(self, folder: str | Path, origin: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self._seen: set[str] = set()
        if origin is None:
            origin = self._origin_found()
        self.origin = {"format": FORMAT, **origin}
        manifest = self.manifest()
        self._listed: dict[str, Any] = {}
        if manifest is not None:
            self._check_origin(self.folder / MANIFEST, manifest["origin"])
            self._listed = manifest["files"]

    def shards(self) -> list[str]:
        """Names of the shards, in order. Raises `ValueError` for a file that belongs to no table."""
        return [name for name in self._names() if SHARD.fullmatch(name)]

    def prompt_lists(self) -> list[pa.Table]:
        """The prompts of each data set in the folder, the largest first, each in its order."""
        lists = [self._read(name, PROMPT_SCHEMA) for name in self._names() if PROMPTS.fullmatch(name)]
        return sorted(lists, key=lambda found: -found.num_rows)

    def read_new(self) -> Iterator[pa.Table]:
        """Shards not read before, in order, each verified against the hash in its name.

        Raises `ValueError` naming the file that is damaged, or was computed with something else.
        """
        for name in self.shards():
            if name not in self._seen:
                self._seen.add(name)
                yield self._read(name, SCHEMA)

    def write_shard(self, kind: str, columns: Mapping[str, Any]) -> str:
        """Add a shard: `kind` is "added" or "losses-" and a number. Returns its name."""
        name = self._write(kind, columns, SCHEMA)
        self._seen.add(name)
        return name

    def write_prompts(self, columns: Mapping[str, Sequence[str]]) -> str:
        """Note the prompts of a data set in their order, for `load`."""
        return self._write("_prompts", columns, PROMPT_SCHEMA)

    def missing(self) -> list[str]:
        """Files that the manifest lists and the folder does not have."""
        listed = (self.manifest() or {"files": {}})["files"]
        return [name for name in sorted(listed) if not (self.folder / name).is_file()]

    def write_manifest(self) -> None:
        """Write the manifest: every file with its sha256. Whoever does it writes the same."""
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
        """`origin`, and by file its sha256 and bytes, as the manifest says; None where there is none yet."""
        path = self.folder / MANIFEST
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_bytes())
            files = {
                str(name): {"sha256": str(entry["sha256"]), "bytes": int(entry["bytes"])}
                for name, entry in found["files"].items()
            }
            return {"origin": dict(found["origin"]), "files": files}
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
        path = self.folder / name
        content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        listed = self._listed.get(name, {"sha256": found})["sha256"]
        if found[:16] != Path(name).stem[-16:] or found != listed:
            raise ValueError(
                f"{path} is damaged: its content is not what its name and {MANIFEST} say; remove it, and "
                "what it held is computed again"
            )
        try:
            table = pq.read_table(pa.BufferReader(content), read_dictionary=NAMES)
            origin = dict(json.loads((table.schema.metadata or {})[METADATA]))
            table = table.select(schema.names)
            for field, column in zip(schema, table.columns, strict=True):
                coded = field.name in NAMES and pa.types.is_dictionary(column.type)
                found_type = column.type.value_type if coded else column.type
                if found_type != field.type or coded != (field.name in NAMES):
                    raise TypeError(f"column {field.name} is {found_type}, not {field.type}")
            if "loss" in schema.names and not pc.all(pc.is_finite(table["loss"])).as_py():
                raise ValueError("a loss that is not finite")
            needed = [field.name for field in schema if not field.nullable]
            if any(table[name].null_count for name in needed):
                raise ValueError(f"empty cells in {', '.join(needed)}")
        except (pa.ArrowException, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ValueError(
                f"{path} is no shard of a reward table ({' '.join(str(error).split())}); remove it, and what "
                "it should hold is computed again"
            ) from error
        self._check_origin(path, origin)
        return table

    def _write(self, kind: str, columns: Mapping[str, Any], schema: pa.Schema) -> str:
        metadata = {METADATA: json.dumps(self.origin, sort_keys=True)}
        arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
        table = pa.table(arrays, schema=schema.with_metadata(metadata))
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd", use_dictionary=NAMES)
        content = buffer.getvalue().to_pybytes()
        name = f"{kind}-{hashlib.sha256(content).hexdigest()[:16]}.parquet"
        if not (self.folder / name).is_file():
            write_file(self.folder / name, content)
        return name

    def _origin_found(self) -> dict[str, Any]:
        """What the files of the folder say they were computed with."""
        manifest = self.manifest()
        if manifest is not None:
            return manifest["origin"]
        names = self._names()
        for name in names:
            try:
                origin = json.loads(pq.read_schema(self.folder / name).metadata[METADATA])
            except (pa.ArrowException, ValueError, KeyError, TypeError, OSError):
                continue  # reading it in full says what is wrong with it
            if isinstance(origin, dict):
                return origin
        said = f"{names[0]} is damaged" if names else "it is empty"
        raise ValueError(f"{self.folder} holds no reward table ({said}): give one that a sweep has written")

    def _check_origin(self, path: Path, origin: Mapping[str, Any]) -> None:
        if origin != self.origin:
            keys = [key for key in self.origin if origin.get(key) != self.origin[key]]
            said = "; ".join(f"{key} {origin.get(key)!r}, here {self.origin[key]!r}" for key in keys)
            raise ValueError(
                f"{path} was computed with another backbone or precision ({said}); choose another folder for "
                "this table"
            )


def write_file(path: Path, content: bytes) -> None:
    """Write a file that is whole or absent: synced beside its place and moved there."""
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
