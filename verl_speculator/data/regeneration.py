"""The target's own answers in place of those in the data: what a drafter must learn to predict is the target.

Answers are written batch by batch into files of their own, so that a run that was stopped goes on where it stood, and
come together in one parquet file at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from verl_speculator.base_model.loading import stop_tokens
from verl_speculator.data.chats import Chat, Message, read_chats
from verl_speculator.data.prompts import encode_prompt, left_pad
from verl_speculator.decoding import SamplingParams, generate
from verl_speculator.errors import ConfigError, DataError

_KEY_FILE = "key.json"


@dataclass(frozen=True)
class RegenerationSettings:
    """How answers are made. `temperature` above 0 samples, from `seed` on."""

    max_new_tokens: int = 1024
    batch_size: int = 32
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    messages_key: str = "messages"

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")


@dataclass(frozen=True)
class Regenerated:
    """What was written: `num_cut` answers reached `max_new_tokens` before the model ended them."""

    num_chats: int
    num_answers: int
    num_tokens: int
    num_cut: int


@dataclass
class _Conversation:
    """A chat without its answers: `answered` is what has been said so far, `asked` what is still to come."""

    row: int  # over all files
    where: str
    answered: list[Message]
    asked: list[list[Message]]  # what leads up to each answer that is to be given
    num_tokens: int = 0
    num_cut: int = 0


def regenerate_answers(
    model: Any,
    tokenizer: Any,
    files: Sequence[str | Path],
    output: Path,
    settings: RegenerationSettings,
    *,
    limit: int | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Regenerated:
    """Write the first `limit` chats of `files` to the parquet file `output` with all assistant turns by `model`.

    Turns are answered in order, each after the model's own earlier answers; a chat that ends with a question gets its
    answer too. Rows keep their order; other columns are dropped. What an earlier call with the same arguments left
    unfinished is gone on with; what one with others left is made anew. `report` is called with the chats done and all.

    Raises:
        DataError: A row that is not a list of messages, or has nothing to answer.
    """
    read = read_chats([str(file) for file in files], settings.messages_key, limit)
    chats = [_without_answers(row, chat) for row, chat in enumerate(read)]
    # Prompts of like length together need little padding; the longest first, so that running out of memory shows early.
    order = sorted(range(len(chats)), key=lambda i: -sum(len(str(turn["content"])) for turn in chats[i].asked[0]))
    batches = [order[start : start + settings.batch_size] for start in range(0, len(order), settings.batch_size)]
    parts = _open_parts(output, _key(model, tokenizer, chats, settings))
    done = 0
    for number, batch in enumerate(batches):
        part = parts / f"{number:06d}.json"
        if not part.is_file():
            generator = torch.Generator(device=model.device).manual_seed(settings.seed + number)
            answered = [chats[i] for i in batch]
            _answer(model, tokenizer, answered, settings, generator)
            _write_json(part, [vars(chat) for chat in answered])
        done += len(batch)
        report(done, len(chats))
    return _collect(parts, len(batches), output, settings.messages_key)


def _without_answers(row: int, chat: Chat) -> _Conversation:
    asked: list[list[Message]] = [[]]
    for turn in chat.asked:
        if turn["role"] == "assistant":
            asked.append([])
        else:
            asked[-1].append(turn)
    if not all(asked):
        raise DataError(f"--data: {chat.where}, has an assistant turn with nothing before it to answer")
    return _Conversation(row, chat.where, [], asked)


def _answer(
    model: Any, tokenizer: Any, chats: list[_Conversation], settings: RegenerationSettings, generator: torch.Generator
) -> None:
    """Answer every question of the chats, turn by turn, all chats of a turn at once."""
    ends = stop_tokens(model, tokenizer)
    while pending := [chat for chat in chats if chat.asked]:
        for chat in pending:
            chat.answered += chat.asked.pop(0)
        prompts = [encode_prompt(tokenizer, chat.answered, chat.where)[1] for chat in pending]
        result = generate(
            model,
            *left_pad(prompts, tokenizer, model.device),
            max_new_tokens=settings.max_new_tokens,
            sampling=settings.sampling,
            eos_token_id=ends,
            generator=None if settings.sampling.is_greedy else generator,
        )
        for chat, tokens in zip(pending, result.tokens, strict=True):
            content = tokenizer.decode(tokens, skip_special_tokens=True)
            chat.answered.append({"role": "assistant", "content": content})
            chat.num_tokens += len(tokens)
            chat.num_cut += tokens[-1] not in ends


def _key(model: Any, tokenizer: Any, chats: Sequence[_Conversation], settings: RegenerationSettings) -> str:
    """What decides the answers: two runs with the same key may share their parts."""
    described = [asdict(settings), str(tokenizer.chat_template), [chat.asked for chat in chats], str(model.config)]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        weights = parameter.detach().flatten()
        # A few of each matrix tell one training of a model from another without reading it all.
        some = weights[:: max(1, weights.numel() // 64)].double().tolist()
        digest.update(f"{name} {parameter.dtype} {some}".encode())
    return digest.hexdigest()


def _open_parts(output: Path, key: str) -> Path:
    """The folder of finished batches, emptied if it belongs to another run."""
    parts = output.with_name(output.name + ".parts")
    key_file = parts / _KEY_FILE
    if not key_file.is_file() or json.loads(key_file.read_text()) != key:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        _write_json(key_file, key)
    return parts


def _collect(parts: Path, num_batches: int, output: Path, messages_key: str) -> Regenerated:
    rows = [row for number in range(num_batches) for row in json.loads((parts / f"{number:06d}.json").read_text())]
    rows.sort(key=lambda row: row["row"])
    table = pa.table({messages_key: [row["answered"] for row in rows]})
    _write_atomically(output, lambda path: pq.write_table(table, path))
    shutil.rmtree(parts)
    return Regenerated(
        num_chats=len(rows),
        num_answers=sum(turn["role"] == "assistant" for row in rows for turn in row["answered"]),
        num_tokens=sum(row["num_tokens"] for row in rows),
        num_cut=sum(row["num_cut"] for row in rows),
    )


def _write_json(path: Path, value: Any) -> None:
    _write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value)))


def _write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)
