"""JSON from untrusted files, read field by field.

JSON cannot hold code, but it can hold wrong values: every field is checked for presence, type, range and
finiteness, and unexpected fields are refused.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn


class Fields:
    """The fields of one JSON object. Each method takes one field and checks it; a field can be taken once.

    Every method raises `ValueError` that names the file and the field; `finish` refuses the remaining fields.
    """

    def __init__(self, path: Path, content: Any, prefix: str = "") -> None:
        """Take the parsed `content` of the file `path`; `prefix` leads to it from the file's top object."""
        self.path = path
        self.prefix = prefix
        if not isinstance(content, dict):
            self._refuse("", content, "an object")
        self.content = dict(content)

    def integer(self, name: str, low: int, high: int) -> int:
        """Take a whole number from `low` to `high`."""
        value = self._take(name)
        if type(value) is not int or not low <= value <= high:
            self._refuse(name, value, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float = -math.inf, high: float = math.inf) -> float:
        """Take a finite number from `low` to `high`."""
        return self._number(name, self._take(name), low, high)

    def text(self, name: str, longest: int = 1024) -> str:
        """Take a string of 1 to `longest` printable characters."""
        value = self._take(name)
        if not isinstance(value, str) or not 0 < len(value) <= longest or not value.isprintable():
            self._refuse(name, value, f"a printable string of 1 to {longest} characters")
        return value

    def digest(self, name: str, length: int = 16) -> str:
        """Take a string of `length` hexadecimal digits."""
        value = self.text(name)
        if len(value) != length or not set(value) <= set("0123456789abcdef"):
            self._refuse(name, value, f"{length} hexadecimal digits")
        return value

    def choice(self, name: str, *choices: str) -> str:
        """Take one of `choices`."""
        value = self._take(name)
        if not isinstance(value, str) or value not in choices:
            self._refuse(name, value, " or ".join(map(repr, choices)))
        return value

    def integers(self, name: str, low: int, high: int, longest: int, shortest: int = 1) -> tuple[int, ...]:
        """Take a list of `shortest` to `longest` whole numbers from `low` to `high`."""
        values = self._list(name, range(shortest, longest + 1))
        for value in values:
            if type(value) is not int or not low <= value <= high:
                self._refuse(name, value, f"whole numbers from {low} to {high}")
        return tuple(values)

    def numbers(
        self, name: str, length: int, low: float = -math.inf, high: float = math.inf
    ) -> tuple[float, ...]:
        """Take a list of `length` finite numbers from `low` to `high`."""
        values = self._list(name, range(length, length + 1))
        return tuple(self._number(name, value, low, high) for value in values)

    def objects(self, name: str, longest: int) -> list[Fields]:
        """Take a list of at most `longest` nested objects."""
        value = self._take(name)
        if not isinstance(value, list) or len(value) > longest:
            self._refuse(name, value, f"a list of at most {longest} objects")
        return [
            Fields(self.path, content, f"{self.prefix}{name}.{index}.") for index, content in enumerate(value)
        ]

    def numbers_or_null(
        self, name: str, length: int, low: float = -math.inf, high: float = math.inf
    ) -> tuple[float, ...] | None:
        """Take what `numbers` takes, or None if the field is null."""
        return None if self.is_null(name) else self.numbers(name, length, low, high)

    def number_or_null(self, name: str, low: float = -math.inf, high: float = math.inf) -> float | None:
        """Take what `number` takes, or None if the field is null."""
        return None if self.is_null(name) else self.number(name, low, high)

    def is_null(self, name: str) -> bool:
        """Return whether the field is null, and take it if it is."""
        if name in self.content and self.content[name] is None:
            self._take(name)
            return True
        return False

    def flag(self, name: str) -> bool:
        """Take a boolean."""
        value = self._take(name)
        if type(value) is not bool:
            self._refuse(name, value, "true or false")
        return value

    def object(self, name: str) -> Fields:
        """Take a nested object."""
        return Fields(self.path, self._take(name), f"{self.prefix}{name}.")

    def texts(self, name: str) -> dict[str, str]:
        """Take a nested object of at most 64 strings."""
        nested = self.object(name)
        if len(nested.content) > 64:
            self._refuse(name, f"{len(nested.content)} fields", "at most 64")
        return {key: nested.text(key) for key in list(nested.content)}

    def finish(self) -> None:
        """Refuse the fields that no method has taken."""
        if self.content:
            self._refuse(next(iter(self.content)), "present", "no such field")

    def _take(self, name: str) -> Any:
        if name not in self.content:
            raise ValueError(f"{self.path}: field {self.prefix + name!r} is missing")
        return self.content.pop(name)

    def _list(self, name: str, lengths: range) -> list[Any]:
        value = self._take(name)
        if not isinstance(value, list) or len(value) not in lengths:
            count = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
            self._refuse(name, value, f"a list of {count} numbers")
        return value

    def _number(self, name: str, value: Any, low: float, high: float) -> float:
        if type(value) not in (int, float) or not (abs(value) < 1e300 and low <= value <= high):
            expected = "a finite number" if (low, high) == (-math.inf, math.inf) else f"{low} to {high}"
            self._refuse(name, value, expected)
        return float(value)

    def _refuse(self, name: str, value: Any, expected: str) -> NoReturn:
        field = (self.prefix + name).rstrip(".")
        text = repr(value)
        text = text if len(text) <= 80 else text[:77] + "..."
        raise ValueError(
            f"{self.path}: {f'field {field!r}' if field else 'content'} is {text}, not {expected}"
        )


def parse_object(path: Path, data: bytes, what: str) -> Fields:
    """Parse the JSON object `data`, which was read from `path`; its fields are not checked yet.

    Raises:
        ValueError: `data` is not a JSON object; the message says that it is not `what`.
    """
    try:
        content = json.loads(
            data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_object
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not {what} in JSON: {error}") from None
    return Fields(path, content)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {duplicate!r} appears twice")
    return content
