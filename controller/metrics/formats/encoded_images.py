"""Images that lie inside tables: base64 in TSV cells, file bytes in Parquet structs."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from deepinsert.envs.data.media import MAX_BYTES
from deepinsert.envs.prompts import EncodedImage

from .records import Row


def from_base64(row: Row, field: str, text: str, path: Path, name: str) -> EncodedImage:
    """The image of a base64 cell, decoded only when it is opened."""
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        row.fault(field, f"an image of more than {MAX_BYTES:,} bytes")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        row.fault(field, f"no base64 image ({error}); is it cut off?")
    return EncodedImage(path.parent, f"{path.name}#{name}", f"{row.where}, field {field!r}", data)


def from_struct(row: Row, field: str, path: Path, name: str) -> EncodedImage:
    """The image of a Parquet struct {"bytes", "path"}, as `datasets` writes it."""
    value = row.values.get(field)
    data = value.get("bytes") if isinstance(value, Mapping) else None
    if not isinstance(data, bytes):
        row.fault(field, 'an image {"bytes", "path"} is expected, as the datasets library writes it')
    return EncodedImage(path.parent, f"{path.name}#{name}", f"{row.where}, field {field!r}", data)
