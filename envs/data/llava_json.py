"""LLaVA's instruction JSON, read and checked for structure only.

Every fault is a `DatasetError` that names file, record and field; images and the order of turns are not
looked at here.
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

    `images` holds paths in their normal spelling, those to be refused as written; `said` pairs of role and
    words.
    """

    id: str
    images: tuple[str, ...]
    said: tuple[tuple[str, str], ...]
    source: str
    index: int


def read_drafts(path: Path) -> list[Draft]:
    """The records of a JSON list, or of one JSON object a line where `path` ends in .jsonl or .ndjson.

    Raises `DatasetError` for whatever is not such a file.
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
            f"{path}: {_kind(items)} instead of a list of records; "
            "LLaVA's format is one list (or one object a line in a file named .jsonl)"
        )
    return items


def _parse(where: str, text: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise DatasetError(f"{where}: nested too deeply for instruction data") from error
    except ValueError as error:
        raise DatasetError(
            f"{where}: not JSON ({error}); is the file cut off, or of another format?"
        ) from error


class _Fault(Exception):
    """What is wrong with a record's structure: field, problem."""


def _draft(path: Path, index: int, item: Any) -> Draft:
    """Check a record's structure; nothing is read from the disk."""
    name = ""
    try:
        if not isinstance(item, dict):
            raise _Fault("record", f"a JSON object is wanted, not {_kind(item)}")
        label = _label(item.get("id"), index)
        name = f" (id {label!r})"
        images = _image_names(item.get("image"))
        return Draft(label, images, _said(item.get("conversations")), _source_of(images), index)
    except _Fault as fault:
        field, problem = fault.args
        raise DatasetError(f"{path}, record {index}{name}, field {field!r}: {problem}") from None


def _label(value: Any, index: int) -> str:
    if value is None:
        return str(index)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise _Fault("id", f"text or a whole number is wanted, not {_kind(value)}")
    return _unicode(str(value), "id")


def _image_names(value: Any) -> tuple[str, ...]:
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _Fault("image", "a path or a list of paths is wanted")
    return tuple(map(_without_dots, names))


def _said(value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list):
        raise _Fault("conversations", f"a list of turns is wanted, not {_kind(value)}")
    said = []
    for position, turn in enumerate(value):
        if not isinstance(turn, dict):
            problem = f'{{"from": ..., "value": ...}} is wanted, not {_kind(turn)}'
            raise _Fault(f"conversations[{position}]", problem)
        role, words = turn.get("from"), turn.get("value")
        if role not in ROLES:
            shown = repr(role[:40]) if isinstance(role, str) else _kind(role)
            raise _Fault(f"conversations[{position}].from", f'"human" or "gpt" is wanted, not {shown}')
        if not isinstance(words, str):
            raise _Fault(f"conversations[{position}].value", f"text is wanted, not {_kind(words)}")
        if not words.isascii():
            _unicode(words, f"conversations[{position}].value")
        said.append((role, words))
    return tuple(said)


def _unicode(text: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Fault(field, "broken Unicode (a lone surrogate); mend or remove it") from None
    return text


def _without_dots(image: str) -> str:
    """One spelling for one good path; a path that is refused later stays as it is, to be shown."""
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
