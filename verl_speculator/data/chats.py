"""Chats in parquet files: a column of lists of `{role, content}` messages. Looked at first, then read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from verl_speculator.errors import ConfigError, DataError, MissingFileError

Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """A row of the data: what is asked, and the assistant's last turn where the chat ends with one."""

    file: str
    row: int  # in its file, from 0
    asked: list[Message]
    answer: Message | None

    @property
    def request(self) -> str:
        """The last message before the answer."""
        return str(self.asked[-1]["content"])

    @property
    def where(self) -> str:
        return f"{self.file!r}, row {self.row}"


def read_chats(files: Sequence[str], messages_key: str, limit: int | None = None, *, key: str = "--data") -> list[Chat]:
    """The first `limit` chats of parquet files that `check_chat_file` has accepted.

    Args:
        key: The flag or configuration key that names the files; errors begin with it.

    Raises:
        DataError: A row that holds nothing to answer, or not a single row.
    """
    chats: list[Chat] = []
    for file in files:
        row = 0
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=256, columns=[messages_key]):
                for messages in batch.column(0).to_pylist():
                    if limit is not None and len(chats) == limit:
                        return chats
                    chats.append(_chat(file, row, messages, key))
                    row += 1
    if not chats:
        raise DataError(f"{key}: {', '.join(map(repr, files))} holds no chat")
    return chats


def _chat(file: str, row: int, messages: Any, key: str) -> Chat:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{key}: {file!r}, row {row}, is not a list of messages")
    # parquet fills the keys that only some messages have.
    turns = [{name: value for name, value in message.items() if value is not None} for message in messages]
    answer = turns.pop() if turns and turns[-1].get("role") == "assistant" else None
    # An assistant's turn that calls a tool may have no content.
    if not turns or not all("role" in turn and ("content" in turn or turn["role"] == "assistant") for turn in turns):
        raise DataError(
            f"{key}: {file!r}, row {row}, has nothing to answer: a chat needs messages of {{role, content}} "
            "before the assistant's last one"
        )
    return Chat(file, row, turns, answer)


def resolve_files(value: Any, key: str) -> list[str]:
    """The files that a `data.*_files` key names; it holds a path or a list of them."""
    files = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else []
    if not files or not all(isinstance(file, str) and file for file in files):
        raise ConfigError(f"{key} must be a parquet file or a list of them, got {value!r}")
    return files


def check_file(file: str, key: str) -> bool:
    """Whether it can be looked at here: a remote file cannot.

    Raises:
        MissingFileError: There is no such file.
    """
    if "://" in file:
        return False
    if not Path(file).is_file():
        what = (
            "is a folder: give the parquet files in it"
            if Path(file).is_dir()
            else "does not exist; give parquet files of chats"
        )
        raise MissingFileError(f"{key}: {file!r} {what}")
    return True


def check_chat_file(file: str, messages_key: str, key: str, *, column_key: str = "data.messages_key") -> float:
    """The number of rows of a chat file, infinity if it is a remote one, which is not looked at.

    Args:
        messages_key: The column that holds the chats.
        key: The flag or configuration key that names the file; errors begin with it.
        column_key: The one that names the column.

    Raises:
        MissingFileError: There is no such file.
        DataError: It is no parquet file, has no rows, or its column of chats is missing or of another shape.
    """
    if not check_file(file, key):
        return math.inf
    try:
        with pq.ParquetFile(file) as parquet:
            columns = parquet.schema_arrow.names
            if messages_key not in columns:
                raise DataError(
                    f"{key}: {file!r} has no column {messages_key!r}, only {', '.join(columns) or 'none at all'}; "
                    f"set {column_key} to the one that holds the messages"
                )
            if parquet.metadata.num_rows == 0:
                raise DataError(f"{key}: {file!r} has no rows, and at least one chat is needed")
            # The first chat stands for the others: reading all of a large file would take too long here.
            first = next(parquet.iter_batches(batch_size=1, columns=[messages_key])).column(0)[0].as_py()
            if not (
                isinstance(first, list)
                and first
                and all(isinstance(message, dict) and {"role", "content"} <= set(message) for message in first)
            ):
                raise DataError(
                    f"{key}: column {messages_key!r} of {file!r} must hold lists of {{role, content}} messages"
                )
            return parquet.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"{key}: {file!r} is not a readable parquet file ({reason})") from error
