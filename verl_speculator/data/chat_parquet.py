"""Looking at chat data before it is used: parquet files with a column of messages."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from verl_speculator.errors import ConfigError, DataError, MissingFileError

_REMOTE = ("hdfs://", "s3://", "gs://", "oss://", "tos://")


def resolve_files(value: Any, key: str) -> list[str]:
    """The files that a ``data.*_files`` key names; it holds a path or a list of them."""
    files = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else []
    if not files or not all(isinstance(file, str) and file for file in files):
        raise ConfigError(f"{key} must be a parquet file or a list of them, got {value!r}")
    return files


def check_chat_file(file: str, messages_key: str, key: str) -> int:
    """The number of rows of a chat file. Remote files are not looked at and count as many.

    :raises MissingFileError: there is no such file
    :raises DataError: it is no parquet file, has no rows, or its messages column is missing or of another shape
    """
    if file.startswith(_REMOTE):
        return 2**62
    path = Path(file).expanduser()
    if not path.is_file():
        raise MissingFileError(f"{key}: there is no file {file!r}")
    try:
        parquet = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{key}: {file!r} is not a readable parquet file ({_first_line(error)})") from error
    with parquet:
        columns = parquet.schema_arrow.names
        if messages_key not in columns:
            raise DataError(
                f"{key}: {file!r} has no column {messages_key!r}, only {', '.join(columns)}; "
                "set data.messages_key to the one that holds the messages"
            )
        if parquet.metadata.num_rows == 0:
            raise DataError(f"{key}: {file!r} has no rows")
        _check_first_row(parquet, messages_key, file, key)
        return parquet.metadata.num_rows


def _check_first_row(parquet: pq.ParquetFile, messages_key: str, file: str, key: str) -> None:
    batch = next(parquet.iter_batches(batch_size=1, columns=[messages_key]))
    messages = batch.column(0)[0].as_py()
    is_chat = isinstance(messages, list) and all(
        isinstance(message, dict) and {"role", "content"} <= set(message) for message in messages
    )
    if not is_chat or not messages:
        raise DataError(
            f"{key}: column {messages_key!r} of {file!r} must hold lists of {{role, content}} messages"
        )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
