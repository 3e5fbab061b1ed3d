"""Chats that have been answered, on disk as they come: a run that was stopped goes on with them.

One line of JSON a chat, in a file named after what decides the answers. How the work is cut (batches, backends,
devices) does not, so a run may go on with another; and a run with other settings leaves this one's answers alone.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from verl_speculator.data.conversations import Conversation
from verl_speculator.data.token_rows import INPUT_IDS, LOSS_MASK, ORIGIN, SCHEMA, TOKENIZER

# Row, sample, and what was asked: other data under the same file name have answers of their own.
ChatId: TypeAlias = tuple[int, int, str]

_CHATS_AT_ONCE = 512


@dataclass(frozen=True)
class Regenerated:
    """What was written.

    Attributes:
        num_rows: Of tokens; more than chats where a template rewrites earlier turns.
        num_cut: Answers that reached `max_new_tokens` before the target ended them.
        num_too_long: Chats of which the target's context does not hold all prompts and answers; what it holds is kept.
    """

    num_chats: int
    num_rows: int
    num_answers: int
    num_tokens: int
    num_cut: int
    num_too_long: int


class FinishedChats:
    def __init__(self, output: Path, key: str) -> None:
        self._output = output
        self._file = output.with_name(output.name + ".parts") / f"{key}.jsonl"
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._places: dict[ChatId, int] = {}
        end = 0
        with self._file.open("ab+") as stream:
            stream.seek(0)
            for line in stream:
                if not line.endswith(b"\n"):
                    break  # the run was killed while it wrote this one
                row, sample, digest = json.loads(line)["chat"]
                self._places[row, sample, digest] = end
                end += len(line)
            stream.truncate(end)
        self._stream = self._file.open("ab")

    def __contains__(self, chat: ChatId) -> bool:
        return chat in self._places

    def add(self, chat: ChatId, done: Conversation, backend: str) -> None:
        counts = {name: getattr(done, name) for name in ("num_answers", "num_tokens", "num_cut", "is_too_long")}
        line = json.dumps({"chat": chat, "rows": done.rows, "backend": backend, **counts}) + "\n"
        self._places[chat] = self._stream.tell()
        self._stream.write(line.encode())
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()

    def collect(self, chats: list[ChatId], messages_key: str, tokenizer: str, origin: Mapping[str, Any]) -> Regenerated:
        """Put these together in the output file, in this order, and clear up."""
        self.close()
        # Messages differ in their keys, and all of them must be in the file's schema.
        kinds = [
            pa.schema([(messages_key, pa.array([row["messages"] for row in rows]).type)]) for rows in self._rows(chats)
        ]
        schema = pa.unify_schemas([pa.schema([]), *kinds, SCHEMA], promote_options="permissive")
        temporary = self._output.with_name(self._output.name + ".tmp")
        with pq.ParquetWriter(temporary, schema) as writer:
            for rows in self._rows(chats):
                how = [json.dumps({**origin, "backend": row["backend"]}) for row in rows]
                columns = {
                    messages_key: [row["messages"] for row in rows],
                    TOKENIZER: [tokenizer] * len(rows),
                    ORIGIN: how,
                }
                columns |= {name: [row[name] for row in rows] for name in ("row", "sample", INPUT_IDS, LOSS_MASK)}
                writer.write_table(pa.table(columns, schema=schema))
        os.replace(temporary, self._output)
        counts = [{**line, "rows": len(line["rows"])} for line in self._lines(chats)]
        shutil.rmtree(self._file.parent)
        return Regenerated(
            num_chats=sum(line["rows"] > 0 for line in counts),
            num_rows=sum(line["rows"] for line in counts),
            num_answers=sum(line["num_answers"] for line in counts),
            num_tokens=sum(line["num_tokens"] for line in counts),
            num_cut=sum(line["num_cut"] for line in counts),
            num_too_long=sum(line["is_too_long"] for line in counts),
        )

    def _lines(self, chats: list[ChatId]) -> Iterator[dict[str, Any]]:
        with self._file.open("rb") as stream:
            for chat in chats:
                stream.seek(self._places[chat])
                yield json.loads(stream.readline())

    def _rows(self, chats: list[ChatId]) -> Iterator[list[dict[str, Any]]]:
        """Some chats' rows at a time: together they may be more than memory holds."""
        lines = self._lines(chats)
        while some := list(islice(lines, _CHATS_AT_ONCE)):
            rows = [
                {**row, "row": line["chat"][0], "sample": line["chat"][1], "backend": line["backend"]}
                for line in some
                for row in line["rows"]
            ]
            if rows:
                yield rows
