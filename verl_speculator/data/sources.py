"""Rows of whatever data there are: parquet, JSON, JSON lines and CSV, folders and patterns of them, the hub by name.

Rows come one by one: a file may be larger than memory. What cannot be read of a file is told as what it is, and what
stands before and after it is read.
"""

from __future__ import annotations

import csv
import glob
from collections.abc import Iterator
from dataclasses import dataclass
from json import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import Any, TextIO, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from verl_speculator.errors import ConfigError, DataError, MissingFileError

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")

# A conversation in one field of a CSV file is easily longer than the module's default of 128 KiB.
csv.field_size_limit(2**31 - 1)
_CHARACTERS_AT_ONCE = 1 << 20
# Of what may still be missing where an object breaks off: a word such as `false`, an escape such as `\ud83d\ude00`.
_LONGEST_WORD = 12

Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Broken:
    """Something that is no row."""

    where: str
    reason: str


@dataclass(frozen=True)
class Found:
    where: str
    row: Row


def read_source(source: str, split: str | None = None, subset: str | None = None) -> Iterator[Found | Broken]:
    """The rows of a file, of all files in a folder or of a pattern, or of a split of a data set that `datasets` loads.

    Args:
        split: Of a data set; "train" if not given. Given with a folder, `datasets` reads that too.

    Raises:
        MissingFileError: There is no such file.
        DataError: It cannot be read at all.
    """
    path = Path(source).expanduser()
    if path.is_dir() and split is None and subset is None:
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise MissingFileError(f"the folder {source!r} has no file that ends in one of {', '.join(SUFFIXES)}")
    elif any(mark in source for mark in "*?["):
        files = sorted(Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        if not files:
            raise MissingFileError(f"there is no file like {source!r}")
    elif path.is_file() or path.suffix.lower() in SUFFIXES:
        files = [path]
    else:
        yield from _read_dataset(str(path) if path.is_dir() else source, split or "train", subset)
        return
    for file in files:
        yield from _read_file(file)


def _read_file(path: Path) -> Iterator[Found | Broken]:
    if not path.is_file():
        raise MissingFileError(f"there is no file {str(path)!r}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{str(path)!r} must end in one of {', '.join(SUFFIXES)} to say what it holds")
    try:
        if suffix == ".parquet":
            with pq.ParquetFile(path) as parquet:
                rows = (row for batch in parquet.iter_batches(batch_size=256) for row in batch.to_pylist())
                for number, row in enumerate(rows):
                    yield Found(f"{str(path)!r}, row {number}", row)
        elif suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                for row in reader:
                    yield Found(f"{str(path)!r}, line {reader.line_num}", row)
        else:
            with path.open(encoding="utf-8-sig") as file:
                yield from _read_json(file, str(path))
    except (pa.ArrowException, OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{str(path)!r} cannot be read ({str(error).splitlines()[0]})") from error


def _read_json(file: TextIO, name: str) -> Iterator[Found | Broken]:
    """An array of objects, or objects one after the other, whatever the file's name says."""
    text = _Text(file)
    in_array = text.peek() == "["
    if in_array:
        text.at += 1
    while (first := text.peek(skip=",")) and first != "]":
        where = f"{name!r}, line {text.line}"
        try:
            value = text.decode()
        except JSONDecodeError as error:
            if text.is_at_end(error):
                yield Broken(where, f"the file ends in the middle of the object that begins at character {text.place}")
                return
            yield Broken(where, f"is not JSON ({error.msg})")
            # In a file of lines the next one is another object; in an array there is no telling where one begins.
            if in_array or not text.skip_line():
                return
            continue
        yield Found(where, value) if isinstance(value, dict) else Broken(where, f"is {_kind(value)} and no object")
    if in_array and not first:
        yield Broken(f"{name!r}, line {text.line}", "the file ends before its array does")


class _Text:
    """A file's text from a place on, as much of it as is needed; `line` is that of the place."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._text, self._is_all = file, "", False
        self.at, self.line = 0, 1
        self._decoder, self._forgotten = JSONDecoder(), 0

    @property
    def place(self) -> int:
        """Of the file's characters, from 0."""
        return self._forgotten + self.at

    def peek(self, skip: str = "") -> str:
        """The next character that is no space and not to be skipped; empty at the end."""
        while True:
            while self.at < len(self._text):
                character = self._text[self.at]
                if not character.isspace() and character not in skip:
                    return character
                self.line += character == "\n"
                self.at += 1
            if not self._more():
                return ""

    def decode(self) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self.at)
            except JSONDecodeError as error:
                # Half an object is no mistake as long as there is more to read.
                if not self._breaks_off(error) or not self._more(len(self._text) - self.at):
                    raise
                continue
            # A number at the end may go on.
            if end == len(self._text) and not isinstance(value, dict | list | str) and self._more():
                continue
            self.line += self._text.count("\n", self.at, end)
            self.at = end
            return value

    def is_at_end(self, error: JSONDecodeError) -> bool:
        """Whether what is wrong is that the text ends."""
        return self._is_all and self._breaks_off(error)

    def skip_line(self) -> bool:
        """Go on with the next line; whether there is one."""
        while (end := self._text.find("\n", self.at)) < 0:
            if not self._more():
                return False
        self.at, self.line = end + 1, self.line + 1
        return True

    def _breaks_off(self, error: JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _LONGEST_WORD

    def _more(self, at_least: int = 0) -> bool:
        """Read on, and forget what lies before the place; much at a time, for an object is decoded from its start."""
        more = self._file.read(max(_CHARACTERS_AT_ONCE, at_least))
        self._is_all = not more
        self._forgotten += self.at
        self._text, self.at = self._text[self.at :] + more, 0
        return bool(more)


def _read_dataset(name: str, split: str, subset: str | None) -> Iterator[Found]:
    # Here: it takes seconds, and files do without.
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            f'loading the data set {name!r} needs the package datasets: pip install "verl_speculator[train]"'
        ) from error
    try:
        rows = load_dataset(name, subset, split=split)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"split {split!r} of the data set {name!r} cannot be loaded ({reason})") from error
    for number, row in enumerate(rows):
        yield Found(f"{name!r}, row {number}", dict(row))


def _kind(value: Any) -> str:
    return {list: "a list", str: "text", type(None): "null"}.get(type(value), "a number")
