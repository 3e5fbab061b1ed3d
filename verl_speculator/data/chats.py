"""Chats in parquet files: a column of lists of `{role, content}` messages. Looked at first, then read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from verl_speculator.data.token_rows import check_token_columns, holds_tokens
from verl_speculator.errors import ConfigError, DataError, MissingFileError

Message = dict[str, Any]

_TOOLS = "tools"


@dataclass(frozen=True)
class Chat:
    """A row of the data: what is asked, and the assistant's last turn where the chat ends with one."""

    file: str
    row: int  # in its file, from 0
    asked: list[Message]
    answer: Message | None
    tools: list[Any] | None = None

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
            columns = [name for name in (messages_key, _TOOLS) if name in parquet.schema_arrow.names]
            for batch in parquet.iter_batches(batch_size=256, columns=columns):
                for values in batch.to_pylist():
                    if limit is not None and len(chats) == limit:
                        return chats
                    chats.append(_chat(file, row, values[messages_key], values.get(_TOOLS), key))
                    row += 1
    if not chats:
        raise DataError(f"{key}: {', '.join(map(repr, files))} holds no chat")
    return chats


def _chat(file: str, row: int, messages: Any, tools: Any, key: str) -> Chat:
    where = f"{key}: {file!r}, row {row}"
    turns = to_turns(messages, where)
    answer = turns.pop() if turns and turns[-1].get("role") == "assistant" else None
    # An assistant's turn that calls a tool may have no content.
    if not turns or not all("role" in turn and ("content" in turn or turn["role"] == "assistant") for turn in turns):
        raise DataError(
            f"{where}, has nothing to answer: a chat needs messages of {{role, content}} before the assistant's "
            "last one"
        )
    return Chat(file, row, turns, answer, to_tools(tools, where))


def to_turns(messages: Any, where: str) -> list[Message]:
    """Messages as a chat template takes them, of what parquet gives.

    Raises:
        DataError: It is no list of messages; the error begins with `where`.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{where}, is not a list of messages")
    return [_without_nulls(message) for message in messages]


def to_tools(tools: Any, where: str) -> list[Any] | None:
    """The tools that a chat may call, from a list of their descriptions or from JSON of one; None where there are none.

    Raises:
        DataError: It is neither; the error begins with `where`.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except ValueError as error:
            raise DataError(f"{where}, has tools that are not JSON ({error})") from error
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{where}, must have a list of tools, not {type(tools).__name__}")
    return _without_nulls(tools) or None


def _without_nulls(value: Any) -> Any:
    """Without the keys that parquet fills in, which has one set of them for all rows of a column."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


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


def check_training_file(file: str, messages_key: str, key: str) -> float:
    """As `check_chat_file`, for a file that may hold tokens instead of chats."""
    if check_file(file, key):
        try:
            schema = pq.read_schema(file)
            if holds_tokens(schema.names):
                check_token_columns(schema, f"{key}: {file!r}")
                return pq.read_metadata(file).num_rows
        except (pa.ArrowException, OSError):
            pass  # check_chat_file says what it is
    return check_chat_file(file, messages_key, key)
