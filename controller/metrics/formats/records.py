"""Files of records (JSON, JSON lines, CSV, TSV, Parquet), read so that a fault names file, record and field.

The files are what benchmarks publish; anything else ends in a `DatasetError` that says what was expected.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

from deepinsert.envs.data.media import DatasetError

csv.field_size_limit(2**27)  # images travel in TSV cells as base64


class Row:
    """A record whose fields are taken by name and kind; `where` says which record of which file it is."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise DatasetError(f"{where}: a record with named fields is expected, not {_kind(values)}")
        self.values = values
        self.where = where

    def fault(self, name: str, problem: str) -> NoReturn:
        """Raise the `DatasetError` about field `name`."""
        raise DatasetError(f"{self.where}, field {name!r}: {problem}")

    def has(self, name: str) -> bool:
        """Whether the field is there and holds something."""
        return not is_blank(self.values.get(name))

    def text(self, name: str, default: str | None = None) -> str:
        """The field as text; numbers are written out. A blank field is a fault without a `default`."""
        value = self.values.get(name)
        if is_blank(value) and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            there = ", ".join(map(str, list(self.values)[:12]))
            self.fault(name, f"text is expected, not {_kind(value)}; the record's fields are: {there}")
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                self.fault(name, "broken Unicode (a lone surrogate); mend the file")
        return str(value)

    def whole(self, name: str) -> int:
        """The field as a whole number, also where it is written as text."""
        value = self.values.get(name)
        try:
            if isinstance(value, bool) or value is None or int(value) != float(value):
                raise ValueError
            return int(value)
        except (TypeError, ValueError, OverflowError):
            self.fault(name, f"a whole number is expected, not {str(value)[:40]!r}")

    def texts(self, name: str) -> tuple[str, ...]:
        """The field as a list of texts."""
        value = self.values.get(name)
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            self.fault(name, f"a list is expected, not {_kind(value)}")
        named = {f"{name}[{index}]": item for index, item in enumerate(value)}
        inner = Row(named, self.where)
        return tuple(inner.text(key) for key in named)

    def rows(self, name: str) -> list[Row]:
        """The field as a list of records."""
        value = self.values.get(name)
        if not isinstance(value, list):
            self.fault(name, f"a list of records is expected, not {_kind(value)}")
        return [Row(item, f"{self.where}, {name}[{index}]") for index, item in enumerate(value)]


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path}: not JSON ({error}); is it cut off, or of another format?") from error


def read_record(path: Path) -> Row:
    """The object that a JSON file holds."""
    return Row(read_json(path), str(path))


def read_jsonl(path: Path) -> list[Row]:
    """The records of a file with one JSON object a line, or of a JSON list."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        return json_rows(path)
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(Row(json.loads(line), f"{path}, line {number}"))
            except (ValueError, RecursionError) as error:
                if isinstance(error, DatasetError):
                    raise
                raise DatasetError(
                    f"{path}, line {number}: not JSON ({error}); one object a line is expected"
                ) from error
    return not_empty(rows, path)


def json_rows(path: Path) -> list[Row]:
    """The records of a JSON list."""
    items = read_json(path)
    if not isinstance(items, list):
        raise DatasetError(f"{path}: a list of records is expected, not {_kind(items)}")
    return not_empty([Row(item, f"{path}, record {index}") for index, item in enumerate(items)], path)


def read_table(path: Path, delimiter: str, columns: Sequence[str], quoted: bool = True) -> list[Row]:
    """The rows of a CSV or TSV file with a header, which must name all `columns`."""
    reader = csv.DictReader(
        StringIO(read_text(path), newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        skipinitialspace=delimiter == ",",
    )
    try:
        rows = [Row(values, f"{path}, line {reader.line_num}") for values in reader]
    except csv.Error as error:
        raise DatasetError(f"{path}, line {reader.line_num}: {error}; is it another format?") from error
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        there = ", ".join(map(str, (reader.fieldnames or ())[:12])) or "none"
        raise DatasetError(f"{path}: no column {missing[0]!r} in its first line; it has: {there}")
    return not_empty(rows, path)


def read_parquet(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a Parquet file, which must have all `columns`; images stay bytes."""
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path).read()
        items = table.to_pylist()
    except Exception as error:  # A broken file makes pyarrow raise anything.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DatasetError(f"{path}: not a whole Parquet file ({reason}); fetch it again") from error
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        there = ", ".join(table.column_names[:12])
        raise DatasetError(f"{path}: no column {missing[0]!r}; it has: {there}")
    return not_empty([Row(item, f"{path}, row {index}") for index, item in enumerate(items)], path)


def parquet_files(data: Path, split: str) -> list[Path]:
    """The Parquet files of a split: `data` itself, or those below it that are named after the split."""
    if data.is_file():
        return [data]
    found = sorted(data.rglob(f"{split}-*.parquet"))
    if not found:
        raise DatasetError(f"{data}: no {split}-*.parquet in it; give the folder that the hub's files are in")
    return found


def read_text(path: Path) -> str:
    """The text of a UTF-8 file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not UTF-8 at byte {error.start}; is it another file?") from error
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}") from error


def beside(path: Path, names: Sequence[str], what: str) -> Path:
    """The first of `names` that lies in the folder of `path`; a `DatasetError` says `what` was looked for."""
    for name in names:
        if (path.parent / name).is_file():
            return path.parent / name
    raise DatasetError(f"{path}: {what} are looked for beside it; put {' or '.join(names)} there")


def not_empty(rows: list[Row], path: Path) -> list[Row]:
    """`rows`, unless there are none."""
    if not rows:
        raise DatasetError(f"{path}: no record in it; is the file cut off?")
    return rows


def by_key(rows: Sequence[Row], key: str) -> dict[str, Row]:
    """Records by a field that none shares with another."""
    found: dict[str, Row] = {}
    for row in rows:
        name = row.text(key)
        if name in found:
            row.fault(key, f"{name!r} was already in {found[name].where}; each may be there once")
        found[name] = row
    return found


def is_blank(value: Any) -> bool:
    """Whether a field holds nothing, as pandas and spreadsheets write it."""
    return value is None or value != value or (isinstance(value, str) and value.strip() in ("", "nan", "NaN"))


def _kind(value: Any) -> str:
    names = {
        dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "nothing",
        int: "a number", float: "a number",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__)
