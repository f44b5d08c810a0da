"""Reads LLaVA's instruction JSON and checks its structure.

Every fault is a `DatasetError` that names file, record and field. Images and the order of turns are checked
later, by `instructions.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .media import DatasetError, normal_path

ROLES = ("human", "gpt")
TEXT_SOURCE = "text"


@dataclass(frozen=True)
class Draft:
    """A record whose structure is right; its images and the order of its turns may still be unusable.

    `images` holds paths in their normal spelling; a path that will be refused keeps its original spelling.
    `turns` holds pairs of role and text.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    source: str
    index: int


def read_drafts(path: Path) -> list[Draft]:
    """Read a JSON list of records, or one JSON object per line where `path` ends in .jsonl or .ndjson.

    Raises `DatasetError` for a file that is unreadable, is not such JSON, or holds a malformed record.
    """
    return [_draft(path, index, item) for index, item in enumerate(_read_items(path))]


def _read_items(path: Path) -> list[Any]:
    """The file's records as plain JSON values."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8 JSON") from error
    except (OSError, ValueError) as error:
        raise DatasetError(f"{str(path)!r} cannot be read: {error}") from error
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        return [_parse(f"{path}, line {number}", line) for number, line in lines]
    items = _parse(str(path), text)
    if not isinstance(items, list):
        raise DatasetError(
            f"{path}: the file holds {_kind(items)} instead of a list of records; "
            "LLaVA's format is one list (or one object per line in a file named .jsonl)"
        )
    return items


def _parse(location: str, text: str) -> Any:
    """The JSON value in `text`; `location` (file, or file and line) stands for it in errors."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise DatasetError(f"{location}: nested too deeply for instruction data") from error
    except ValueError as error:
        raise DatasetError(
            f"{location}: not JSON ({error}); is the file truncated, or in another format?"
        ) from error


class _Fault(Exception):
    """A fault in a record's structure: its arguments are the field and the problem."""


def _draft(path: Path, index: int, item: Any) -> Draft:
    """Check the structure of one record; this reads nothing from the disk."""
    id_note = ""
    try:
        if not isinstance(item, dict):
            raise _Fault("record", f"expected a JSON object, not {_kind(item)}")
        record_id = _record_id(item.get("id"), index)
        id_note = f" (id {record_id!r})"
        images = _image_names(item.get("image"))
        return Draft(record_id, images, _turns(item.get("conversations")), _source_of(images), index)
    except _Fault as fault:
        field, problem = fault.args
        raise DatasetError(f"{path}, record {index}{id_note}, field {field!r}: {problem}") from None


def _record_id(value: Any, index: int) -> str:
    if value is None:
        return str(index)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise _Fault("id", f"expected text or a whole number, not {_kind(value)}")
    return _valid_unicode(str(value), "id")


def _image_names(value: Any) -> tuple[str, ...]:
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _Fault("image", "expected a path or a list of paths")
    return tuple(map(_normal_spelling, names))


def _turns(value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list):
        raise _Fault("conversations", f"expected a list of turns, not {_kind(value)}")
    turns = []
    for position, turn in enumerate(value):
        field = f"conversations[{position}]"
        if not isinstance(turn, dict):
            raise _Fault(field, f'expected {{"from": ..., "value": ...}}, not {_kind(turn)}')
        role, text = turn.get("from"), turn.get("value")
        if role not in ROLES:
            label = repr(role[:40]) if isinstance(role, str) else _kind(role)
            raise _Fault(f"{field}.from", f'expected "human" or "gpt", not {label}')
        if not isinstance(text, str):
            raise _Fault(f"{field}.value", f"expected text, not {_kind(text)}")
        if not text.isascii():
            _valid_unicode(text, f"{field}.value")
        turns.append((role, text))
    return tuple(turns)


def _valid_unicode(text: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Fault(field, "broken Unicode (a lone surrogate); mend or remove it") from None
    return text


def _normal_spelling(image: str) -> str:
    """The normal spelling of a valid path; an invalid path stays as it is, since a later error quotes it."""
    try:
        return normal_path(image)
    except DatasetError:
        return image


def _source_of(images: Sequence[str]) -> str:
    if not images:
        return TEXT_SOURCE
    folder, slash, _ = images[0].partition("/")
    return folder if slash else "."


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")
