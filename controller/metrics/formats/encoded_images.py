"""Images inside tables: base64 in TSV cells, and file bytes in Parquet structs."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from deepinsert.envs.data.media import MAX_BYTES
from deepinsert.envs.prompts import EncodedImage

from .records import Row


def from_base64(row: Row, field: str, text: str, path: Path, name: str) -> EncodedImage:
    """Return the image of a base64 cell, which is decoded only when it is opened.

    Args:
        row: the record, for messages.
        field: the field of the record, for messages.
        text: the base64 text.
        path: the file that holds the record.
        name: the name of the image within the file.
    """
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        row.fault(field, f"the image has more than {MAX_BYTES:,} bytes")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        row.fault(field, f"the text is no base64 image ({error}); is it cut off?")
    return EncodedImage(path.parent, f"{path.name}#{name}", f"{row.origin}, field {field!r}", data)


def from_struct(row: Row, field: str, path: Path, name: str) -> EncodedImage:
    """Return the image of a Parquet struct {"bytes", "path"}, as the datasets library writes it.

    Args:
        row: the record with the struct.
        field: the field of the struct.
        path: the file that holds the record.
        name: the name of the image within the file.
    """
    value = row.values.get(field)
    data = value.get("bytes") if isinstance(value, Mapping) else None
    if not isinstance(data, bytes):
        row.fault(field, 'an image {"bytes", "path"} is expected, as the datasets library writes it')
    return EncodedImage(path.parent, f"{path.name}#{name}", f"{row.origin}, field {field!r}", data)
