"""Looking at chat data before it is used: parquet files with a column of messages."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from verl_speculator.errors import ConfigError, DataError, MissingFileError


def resolve_files(value: Any, key: str) -> list[str]:
    """The files that a ``data.*_files`` key names; it holds a path or a list of them."""
    files = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else []
    if not files or not all(isinstance(file, str) and file for file in files):
        raise ConfigError(f"{key} must be a parquet file or a list of them, got {value!r}")
    return files


def check_file(file: str, key: str) -> bool:
    """Whether it can be looked at here: a remote file cannot.

    :raises MissingFileError: there is no such file
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


def check_chat_file(file: str, messages_key: str, key: str) -> float:
    """The number of rows of a chat file, infinity if it is a remote one, which is not looked at.

    :raises MissingFileError: there is no such file
    :raises DataError: it is no parquet file, has no rows, or its messages column is missing or of another shape
    """
    if not check_file(file, key):
        return math.inf
    try:
        with pq.ParquetFile(file) as parquet:
            _check_columns(parquet, messages_key, file, key)
            return parquet.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{key}: {file!r} is not a readable parquet file ({_first_line(error)})") from error


def _check_columns(parquet: pq.ParquetFile, messages_key: str, file: str, key: str) -> None:
    columns = parquet.schema_arrow.names
    if messages_key not in columns:
        raise DataError(
            f"{key}: {file!r} has no column {messages_key!r}, only {', '.join(columns) or 'none at all'}; "
            "set data.messages_key to the one that holds the messages"
        )
    if parquet.metadata.num_rows == 0:
        raise DataError(f"{key}: {file!r} has no rows, and at least one chat is needed")
    batch = next(parquet.iter_batches(batch_size=1, columns=[messages_key]))
    if not _is_chat(batch.column(0)[0].as_py()):
        raise DataError(f"{key}: column {messages_key!r} of {file!r} must hold lists of {{role, content}} messages")


def _is_chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(isinstance(message, dict) and {"role", "content"} <= set(message) for message in messages)
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
