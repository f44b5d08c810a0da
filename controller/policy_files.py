"""Reads and writes `policy.json` and `policy.safetensors`, trusting nothing in them.

Neither format can hold code. What they can hold is nonsense, so every field is checked for presence, type,
range and finiteness, and every tensor for name, precision, shape and finite values.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from .runs import replacing, write_json

DESCRIPTION = "policy.json"
WEIGHTS = "policy.safetensors"
MAX_JSON_BYTES = 4 * 2**20
MAX_WEIGHTS_BYTES = 256 * 2**20


class Fields:
    """The fields of one JSON object, each taken once by a method that checks it.

    Every method raises `ValueError` naming the file and the field; `finish` refuses fields nobody asked for.
    """

    def __init__(self, path: Path, content: Any, prefix: str = "") -> None:
        self.path = path
        self.prefix = prefix
        if not isinstance(content, dict):
            self._refuse("", content, "an object")
        self.content = dict(content)

    def integer(self, name: str, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        value = self._take(name)
        if type(value) is not int or not low <= value <= high:
            self._refuse(name, value, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number from `low` to `high`."""
        return self._number(name, self._take(name), low, high)

    def text(self, name: str, longest: int = 1024) -> str:
        """A string of 1 to `longest` printable characters."""
        value = self._take(name)
        if not isinstance(value, str) or not 0 < len(value) <= longest or not value.isprintable():
            self._refuse(name, value, f"a printable string of 1 to {longest} characters")
        return value

    def choice(self, name: str, *choices: str) -> str:
        """One of `choices`."""
        value = self._take(name)
        if not isinstance(value, str) or value not in choices:
            self._refuse(name, value, " or ".join(map(repr, choices)))
        return value

    def integers(self, name: str, low: int, high: int, longest: int) -> tuple[int, ...]:
        """A list of 1 to `longest` whole numbers from `low` to `high`."""
        values = self._list(name, range(1, longest + 1))
        for value in values:
            if type(value) is not int or not low <= value <= high:
                self._refuse(name, value, f"whole numbers from {low} to {high}")
        return tuple(values)

    def numbers(
        self, name: str, length: int, low: float = -math.inf, high: float = math.inf
    ) -> tuple[float, ...]:
        """A list of `length` finite numbers from `low` to `high`."""
        values = self._list(name, range(length, length + 1))
        return tuple(self._number(name, value, low, high) for value in values)

    def is_null(self, name: str) -> bool:
        """Whether the field is null; it is then taken."""
        if name in self.content and self.content[name] is None:
            self._take(name)
            return True
        return False

    def object(self, name: str) -> Fields:
        """A nested object."""
        return Fields(self.path, self._take(name), f"{self.prefix}{name}.")

    def texts(self, name: str) -> dict[str, str]:
        """A nested object of at most 64 strings."""
        nested = self.object(name)
        if len(nested.content) > 64:
            self._refuse(name, f"{len(nested.content)} fields", "at most 64")
        return {key: nested.text(key) for key in list(nested.content)}

    def finish(self) -> None:
        """Refuse what was not asked for."""
        if self.content:
            self._refuse(next(iter(self.content)), "present", "no such field")

    def _take(self, name: str) -> Any:
        if name not in self.content:
            raise ValueError(f"{self.path}: field {self.prefix + name!r} is missing")
        return self.content.pop(name)

    def _list(self, name: str, lengths: range) -> list[Any]:
        value = self._take(name)
        if not isinstance(value, list) or len(value) not in lengths:
            expected = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
            self._refuse(name, value, f"a list of {expected} numbers")
        return value

    def _number(self, name: str, value: Any, low: float, high: float) -> float:
        if type(value) not in (int, float) or not (abs(value) < 1e300 and low <= value <= high):
            wanted = "a finite number" if (low, high) == (-math.inf, math.inf) else f"{low} to {high}"
            self._refuse(name, value, wanted)
        return float(value)

    def _refuse(self, name: str, value: Any, expected: str) -> NoReturn:
        field = (self.prefix + name).rstrip(".")
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise ValueError(
            f"{self.path}: {f'field {field!r}' if field else 'content'} is {shown}, not {expected}"
        )


def write_policy_files(
    folder: str | Path, description: Mapping[str, Any], tensors: Mapping[str, NDArray[np.float32]]
) -> None:
    """Write both files atomically, `policy.json` last: it names the SHA-256 of the weights it belongs to."""
    weights = safetensors.numpy.save({name: np.ascontiguousarray(value) for name, value in tensors.items()})
    with replacing(Path(folder) / WEIGHTS) as temporary:
        temporary.write_bytes(weights)
    digest = hashlib.sha256(weights).hexdigest()
    write_json(Path(folder) / DESCRIPTION, {**description, "weights_sha256": digest})


def read_description(folder: str | Path) -> Fields:
    """The fields of `policy.json`, none of them checked yet.

    Raises `FileNotFoundError` where there is no such file and `ValueError` where it is not a JSON object.
    """
    path = Path(folder) / DESCRIPTION
    data = _read(path, MAX_JSON_BYTES)
    try:
        content = json.loads(
            data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_object
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a policy description in JSON: {error}") from None
    return Fields(path, content)


def read_tensors(
    folder: str | Path, shapes: Mapping[str, tuple[int, ...]], sha256: str
) -> dict[str, NDArray[np.float32]]:
    """The tensors of `policy.safetensors`: exactly those of `shapes`, float32 and finite."""
    path = Path(folder) / WEIGHTS
    data = _read(path, MAX_WEIGHTS_BYTES)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(
            f"{path}: does not belong to the {DESCRIPTION} beside it (field 'weights_sha256'); copy both "
            "files again, or train again"
        )
    try:
        stored = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from None
    for name in sorted(stored.keys() ^ shapes.keys()):
        known = "is missing" if name in shapes else "is not part of a layer policy"
        raise ValueError(f"{path}: tensor {name!r} {known}")
    tensors = {}
    for name, shape in shapes.items():
        entry = stored[name]
        if entry["dtype"] != "F32" or tuple(entry["shape"]) != shape:
            found = f"{entry['dtype']} {tuple(entry['shape'])}"
            raise ValueError(f"{path}: tensor {name!r} is {found}, {DESCRIPTION} describes F32 {shape}")
        values = np.frombuffer(entry["data"], dtype="<f4").reshape(shape).astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError(f"{path}: tensor {name!r} holds a value that is not finite")
        tensors[name] = values
    return tensors


def _read(path: Path, most: int) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the run folder of deepinsert train-policy")
    if path.stat().st_size > most:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, more than a layer policy's {most}")
    return path.read_bytes()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} appears twice")
    return content
