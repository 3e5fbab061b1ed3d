"""Reading rows of any chat data and writing them as the parquet files that training reads."""

from __future__ import annotations

import csv
import json
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from verl_speculator.errors import ConfigError, DataError, MissingFileError

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")
SCHEMA = pa.schema([("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))])

# A conversation in one field of a CSV file is easily longer than the module's default of 128 KiB.
csv.field_size_limit(2**31 - 1)

Row = Mapping[str, Any]
Messages = list[dict[str, str]]


def is_local_file(source: str) -> bool:
    return Path(source).suffix.lower() in SUFFIXES


def read_rows(source: str, split: str, subset: str | None = None) -> list[Row]:
    """The rows of a local file, or of a split of a data set that ``datasets`` finds by name or folder.

    :raises MissingFileError: a file that is not there
    :raises DataError: a file that cannot be read or has no rows; a data set or split that cannot be loaded
    """
    path = Path(source).expanduser()
    if is_local_file(source):
        if not path.is_file():
            raise MissingFileError(f"there is no file {source!r}")
        rows = list(_read_file(path))
    elif path.is_file():
        raise DataError(f"{source!r} must end in one of {', '.join(SUFFIXES)} to say what it holds")
    else:
        rows = _load_dataset(str(path) if path.is_dir() else source, split, subset)
    if not rows:
        raise DataError(f"{source!r} has no rows")
    return rows


def write_split(rows: Sequence[Messages], file: Path) -> None:
    """Write one row per conversation, in a column ``messages`` of {role, content}."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"messages": rows}, schema=SCHEMA), file)
    except OSError as error:
        raise DataError(f"{str(file)!r} cannot be written ({error.strerror})") from error
    print(f"{len(rows):>8} conversations in {file}")


def train_test_split(
    rows: Sequence[Messages], test_fraction: float, seed: int
) -> tuple[list[Messages], list[Messages]]:
    """Shuffle and divide. A fraction above 0 takes at least one row, and the training part keeps at least one."""
    if not 0 <= test_fraction < 1:
        raise ConfigError(f"--test-fraction must be at least 0 and less than 1, got {test_fraction}")
    num_test = max(round(len(rows) * test_fraction), 1) if test_fraction else 0
    if num_test >= len(rows):
        raise DataError(f"{len(rows)} usable conversations are too few to hold {num_test} out for testing")
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    return shuffled[num_test:], shuffled[:num_test]


def column(row: Row, key: str, source: str) -> Any:
    """The value of a column, whose absence is an error that lists those there are."""
    if key not in row:
        raise DataError(f"{source!r} has no column {key!r}, only {', '.join(map(str, row))}")
    return row[key]


def report(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _read_file(path: Path) -> Iterator[Row]:
    try:
        if path.suffix.lower() == ".parquet":
            yield from pq.read_table(path).to_pylist()
        elif path.suffix.lower() == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield from csv.DictReader(file)
        else:
            yield from _read_json(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{str(path)!r} cannot be read ({str(error).splitlines()[0]})") from error


def _read_json(path: Path) -> Iterator[Row]:
    """An array of objects, or one object a line, whatever the file's name says."""
    with path.open(encoding="utf-8-sig") as file:
        start = file.read(4096).lstrip()
        file.seek(0)
        numbered = [(1, file.read())] if start.startswith("[") else enumerate(file, start=1)
        for number, text in numbered:
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except ValueError as error:
                raise DataError(f"{str(path)!r} is not JSON at line {number} ({error})") from error
            for row in value if isinstance(value, list) else [value]:
                if not isinstance(row, dict):
                    raise DataError(f"{str(path)!r} must hold JSON objects, not {type(row).__name__}")
                yield row


def _load_dataset(name: str, split: str, subset: str | None) -> Iterable[Row]:
    # Imported here: it takes seconds, and local files do without.
    from datasets import load_dataset

    try:
        return list(load_dataset(name, subset, split=split))
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"split {split!r} of the data set {name!r} cannot be loaded ({reason})") from error
