"""Chats in whatever form, as the parquet file that training and `regenerate` read."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from verl_speculator.data.sources import Broken, Found, Row
from verl_speculator.errors import ConfigError, DataError

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_MESSAGES = ("messages", "conversations", "conversation")
_PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("prompt", "answer"),
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
)
_SCHEMA = pa.schema(
    [
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("tools", pa.string()),  # JSON: each row has tools of another shape
    ]
)
# Shuffled together, and in memory at a time.
_ROWS_AT_ONCE = 10_000
_WHERE_NAMED = 3

Chat: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """Where in a row the chat is; what is not given is found by the names that such columns have.

    Attributes:
        messages_key: Column of messages.
        prompt_key: Column of what the user says, instead; `response_key` that of the answer.
        system_key: Column of system messages, next to `prompt_key`.
        unanswered: Chats need no answer: `regenerate` gives them one.
    """

    messages_key: str | None = None
    prompt_key: str | None = None
    response_key: str | None = None
    system_key: str | None = None
    unanswered: bool = False

    def __post_init__(self) -> None:
        if self.prompt_key and self.messages_key:
            raise ConfigError("give --messages-key, or --prompt-key and --response-key, not both")
        if (self.prompt_key is None) != (self.response_key is None) and not (self.unanswered and self.prompt_key):
            raise ConfigError("--prompt-key and --response-key go together; without answers give --unanswered")
        if self.system_key and not self.prompt_key:
            raise ConfigError("--system-key needs --prompt-key and --response-key")


class _NoChatError(Exception):
    """Why a row has no chat that can be used."""


@dataclass
class LeftOut:
    """Rows that are not used, and why: for each reason how many, and where the first ones are."""

    places: dict[str, list[str]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, where: str, reason: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        some = self.places.setdefault(reason, [])
        if len(some) < _WHERE_NAMED:
            some.append(where)

    def lines(self) -> list[str]:
        return [
            f"{self.counts[reason]:>8} rows left out: {reason} ({'; '.join(places)}"
            f"{'; ...' if self.counts[reason] > len(places) else ''})"
            for reason, places in self.places.items()
        ]


def to_chats(found: Iterable[Found | Broken], form: Form, left_out: LeftOut, *, strict: bool = False) -> Iterator[Chat]:
    """Those that can be used; the others are noted in `left_out`.

    Raises:
        DataError: One cannot be used, if `strict`.
    """
    for item in found:
        try:
            if isinstance(item, Broken):
                raise _NoChatError(item.reason)
            yield _to_chat(item.row, form)
        except _NoChatError as error:
            if strict:
                raise DataError(f"{item.where}: {error}; leave out --strict to go on without such rows") from error
            left_out.add(item.where, str(error))


def write_chats(chats: Iterator[Chat], train: Path, test: Path | None, test_fraction: float, seed: int) -> list[int]:
    """Shuffle the chats and write them to `train`, a share of them to `test`; the numbers of both.

    A share above 0 is at least one chat, and `train` keeps at least one. Files appear whole or not at all. More chats
    than memory should hold are shuffled some at a time.

    Raises:
        DataError: There are too few chats, or a file cannot be written.
    """
    if not 0 <= test_fraction < 1:
        raise ConfigError(f"--test-fraction must be at least 0 and less than 1, got {test_fraction}")
    files = [train, *([test] if test else [])]
    counts = [0] * len(files)
    generator = random.Random(seed)
    first = list(islice(chats, _ROWS_AT_ONCE))
    if not first:
        raise DataError("no row has a chat that can be used")
    if test and test_fraction and len(first) < 2:
        raise DataError("1 usable conversation is too few to hold 1 out for testing")
    try:
        train.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            temporary = [file.with_name(file.name + ".tmp") for file in files]
            for file in temporary:
                stack.callback(file.unlink, missing_ok=True)
            writers = [stack.enter_context(pq.ParquetWriter(file, _SCHEMA)) for file in temporary]
            some = first
            while some:
                generator.shuffle(some)
                num_test = 0
                if test and test_fraction:
                    wanted = round((sum(counts) + len(some)) * test_fraction) - counts[1]
                    num_test = min(max(wanted, 0 if counts[1] else 1), len(some) - 1)
                for part, rows in enumerate([some[num_test:], some[:num_test]][: len(files)]):
                    writers[part].write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
                    counts[part] += len(rows)
                some = list(islice(chats, _ROWS_AT_ONCE))
            for writer in writers:
                writer.close()
            for file, final in zip(temporary, files, strict=True):
                os.replace(file, final)
    except OSError as error:
        raise DataError(f"{str(train.parent)!r} cannot be written ({error.strerror})") from error
    return counts


def _to_chat(row: Row, form: Form) -> Chat:
    if form.prompt_key:
        messages = _from_pair(row, form.prompt_key, form.response_key, form.system_key)
    else:
        key = form.messages_key or next((name for name in _MESSAGES if name in row), None)
        if key is not None:
            messages = _from_messages(_column(row, key), key)
        else:
            pair = next((pair for pair in _PAIRS if set(pair) <= set(row)), None)
            if pair is None:
                columns = ", ".join(map(str, row)) or "none at all"
                raise _NoChatError(
                    f"has no column 'messages', only {columns}; name its own with --messages-key, or with --prompt-key "
                    "and --response-key"
                )
            messages = _from_pair(row, *pair, "system" if "system" in row else None)
    if not any(message["role"] == "user" for message in messages):
        raise _NoChatError("empty or without a turn of the user")
    if not form.unanswered and not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise _NoChatError("without an answer")
    tools = row.get("tools") or None
    return {"messages": messages, "tools": tools if tools is None or isinstance(tools, str) else json.dumps(tools)}


def _from_messages(value: Any, key: str) -> list[dict[str, str]]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise _NoChatError(f"column {key!r} is not a JSON list") from error
    if not isinstance(value, list):
        raise _NoChatError(
            "empty or without a turn of the user"
            if value is None
            else f"column {key!r} must be a list of messages, not {type(value).__name__}"
        )
    return [_to_message(message, key) for message in value]


def _to_message(message: Any, key: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise _NoChatError(f"column {key!r} must hold messages, not {type(message).__name__}")
    for role_key, text_key in (("role", "content"), ("from", "value")):
        if role_key in message and text_key in message:
            break
    else:
        raise _NoChatError(
            f"a message with the keys {', '.join(map(str, message))}; it needs role and content, or from and value"
        )
    name, text = message[role_key], message[text_key]
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise _NoChatError(f"a message of {name!r}; known are {', '.join(ROLES)}")
    if not isinstance(text, str):
        what = "without text, such as a call of a tool" if text is None else f"whose {text_key} is no text"
        raise _NoChatError(f"a message {what}")
    return {"role": role, "content": text}


def _from_pair(row: Row, prompt: str, response: str | None, system: str | None) -> list[dict[str, str]]:
    keys: Sequence[tuple[str, str | None]] = (("system", system), ("user", prompt), ("assistant", response))
    texts = {role: _column(row, key) for role, key in keys if key}
    for role, key in keys:
        if key and texts[role] is not None and not isinstance(texts[role], str):
            raise _NoChatError(f"column {key!r} must hold text, not {type(texts[role]).__name__}")
    # Alpaca's third column is what the instruction is about.
    if prompt == "instruction" and isinstance(row.get("input"), str) and row["input"].strip():
        texts["user"] = f"{texts['user']}\n\n{row['input']}"
    return [{"role": role, "content": text} for role, text in texts.items() if text is not None and text.strip()]


def _column(row: Row, key: str) -> Any:
    if key not in row:
        raise _NoChatError(f"has no column {key!r}, only {', '.join(map(str, row))}")
    return row[key]
