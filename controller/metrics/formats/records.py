"""Readers of files of records (JSON, JSON lines, CSV, TSV, Parquet) whose errors name file, record and field.

The files are those that benchmarks publish. Any other content ends in a `DatasetError` that names what was
expected.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

from deepinsert.envs.data.media import DatasetError

csv.field_size_limit(2**27)  # cells of a TSV may hold images as base64

FIELDS_IN_MESSAGE = 12


class Row:
    """A record whose fields are read by name and type; `origin` names it and its file in messages."""

    def __init__(self, values: Any, origin: str) -> None:
        if not isinstance(values, Mapping):
            raise DatasetError(f"{origin}: a record with named fields is expected, not {_kind(values)}")
        self.values = values
        self.origin = origin

    def fault(self, name: str, problem: str) -> NoReturn:
        """Raise the `DatasetError` about field `name`."""
        raise DatasetError(f"{self.origin}, field {name!r}: {problem}")

    def has(self, name: str) -> bool:
        """Return whether the field exists and is not blank."""
        return not is_blank(self.values.get(name))

    def text(self, name: str, default: str | None = None) -> str:
        """Return the field as text; numbers are written out.

        Raises:
            DatasetError: the field is blank and there is no `default`, or it is no text.
        """
        value = self.values.get(name)
        if is_blank(value) and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            fields = ", ".join(map(str, list(self.values)[:FIELDS_IN_MESSAGE]))
            self.fault(name, f"text is expected, not {_kind(value)}; the record's fields are: {fields}")
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                self.fault(name, "the text has broken Unicode (a lone surrogate); mend the file")
        return str(value)

    def whole(self, name: str) -> int:
        """Return the field as a whole number, which may be written as text."""
        value = self.values.get(name)
        try:
            if isinstance(value, bool) or value is None or int(value) != float(value):
                raise ValueError
            return int(value)
        except (TypeError, ValueError, OverflowError):
            self.fault(name, f"a whole number is expected, not {str(value)[:40]!r}")

    def texts(self, name: str) -> tuple[str, ...]:
        """Return the field as a list of texts."""
        value = self.values.get(name)
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            self.fault(name, f"a list is expected, not {_kind(value)}")
        items = {f"{name}[{index}]": item for index, item in enumerate(value)}
        inner = Row(items, self.origin)
        return tuple(inner.text(key) for key in items)

    def rows(self, name: str) -> list[Row]:
        """Return the field as a list of records."""
        value = self.values.get(name)
        if not isinstance(value, list):
            self.fault(name, f"a list of records is expected, not {_kind(value)}")
        return [Row(item, f"{self.origin}, {name}[{index}]") for index, item in enumerate(value)]


def read_json(path: Path) -> Any:
    """Read the value of a JSON file."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(
            f"{path}: the file is not JSON ({error}); is it cut off, or of another format?"
        ) from error


def read_record(path: Path) -> Row:
    """Read a JSON file that holds one object."""
    return Row(read_json(path), str(path))


def read_jsonl(path: Path) -> list[Row]:
    """Read the records of a file with one JSON object per line, or of a JSON list."""
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
                    f"{path}, line {number}: the line is not JSON ({error}); one object per line is expected"
                ) from error
    return not_empty(rows, path)


def json_rows(path: Path) -> list[Row]:
    """Read the records of a JSON list."""
    items = read_json(path)
    if not isinstance(items, list):
        raise DatasetError(f"{path}: a list of records is expected, not {_kind(items)}")
    return not_empty([Row(item, f"{path}, record {index}") for index, item in enumerate(items)], path)


def read_table(path: Path, delimiter: str, columns: Sequence[str], quoted: bool = True) -> list[Row]:
    """Read the rows of a CSV or TSV file with a header.

    Args:
        path: the file.
        delimiter: the character between two cells.
        columns: names that the header must contain.
        quoted: whether cells may be in double quotes.
    """
    reader = csv.DictReader(
        StringIO(read_text(path), newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        skipinitialspace=delimiter == ",",
    )
    try:
        rows = [Row(values, f"{path}, line {reader.line_num}") for values in reader]
    except csv.Error as error:
        raise DatasetError(
            f"{path}, line {reader.line_num}: {error}; does the file have another format?"
        ) from error
    names = reader.fieldnames or ()
    missing = [name for name in columns if name not in names]
    if missing:
        header = ", ".join(map(str, names[:FIELDS_IN_MESSAGE])) or "nothing"
        raise DatasetError(f"{path}: the first line has no column {missing[0]!r}; it has: {header}")
    return not_empty(rows, path)


def read_parquet(path: Path, columns: Sequence[str]) -> list[Row]:
    """Read the rows of a Parquet file, which must have all `columns`; images stay bytes."""
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path).read()
        items = table.to_pylist()
    except Exception as error:  # pyarrow raises errors of many types for a broken file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DatasetError(
            f"{path}: the file is not a whole Parquet file ({reason}); download it again"
        ) from error
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        names = ", ".join(table.column_names[:FIELDS_IN_MESSAGE])
        raise DatasetError(f"{path}: the table has no column {missing[0]!r}; it has: {names}")
    return not_empty([Row(item, f"{path}, row {index}") for index, item in enumerate(items)], path)


def parquet_files(data: Path, split: str) -> list[Path]:
    """Return the Parquet files of a split: `data` itself, or the files below it that are named after it."""
    if data.is_file():
        return [data]
    files = sorted(data.rglob(f"{split}-*.parquet"))
    if not files:
        raise DatasetError(
            f"{data}: there is no {split}-*.parquet in it; give the folder that holds the hub's files"
        )
    return files


def read_text(path: Path) -> str:
    """Read the text of a UTF-8 file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}: the file is not UTF-8 at byte {error.start}; is it another file?"
        ) from error
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}") from error


def file_beside(path: Path, names: Sequence[str], content: str) -> Path:
    """Return the first of the files `names` that exists in the folder of `path`.

    Raises:
        DatasetError: there is none; the message names the `content` that the file should have.
    """
    for name in names:
        if (path.parent / name).is_file():
            return path.parent / name
    raise DatasetError(f"{path}: {content} are expected beside it; put {' or '.join(names)} there")


def not_empty(rows: list[Row], path: Path) -> list[Row]:
    """Return `rows`; raise `DatasetError` if there are none."""
    if not rows:
        raise DatasetError(f"{path}: there is no record in it; is the file cut off?")
    return rows


def by_key(rows: Sequence[Row], key: str) -> dict[str, Row]:
    """Return records by the text of a field.

    Raises:
        DatasetError: two records have the same text.
    """
    row_of_key: dict[str, Row] = {}
    for row in rows:
        name = row.text(key)
        if name in row_of_key:
            row.fault(key, f"{name!r} was already in {row_of_key[name].origin}; each may occur once")
        row_of_key[name] = row
    return row_of_key


def is_blank(value: Any) -> bool:
    """Return whether a field holds nothing, in one of the ways of pandas and spreadsheets."""
    return value is None or value != value or (isinstance(value, str) and value.strip() in ("", "nan", "NaN"))


def _kind(value: Any) -> str:
    """Name the type of a JSON value for a message."""
    names = {
        dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "nothing",
        int: "a number", float: "a number",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__)
