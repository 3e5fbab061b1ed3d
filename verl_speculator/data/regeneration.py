"""The target's own answers in place of those in the data: what a drafter must learn to predict is the target.

Answers are written batch by batch into files of their own, so that a run that was stopped goes on where it stood, and
come together in one parquet file at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from verl_speculator.decoding import SamplingParams, generate
from verl_speculator.errors import ConfigError, DataError

Message = dict[str, Any]

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
class _Chat:
    """A conversation without its answers: `answered` is what has been said so far, `asked` what is still to come."""

    row: int
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
        DataError: a row that is not a list of messages, or has nothing to answer.
    """
    chats = list(_read_chats(files, settings.messages_key, limit))
    if not chats:
        raise DataError(f"{', '.join(map(str, files))}: there is no chat to answer")
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


def _read_chats(files: Sequence[str | Path], messages_key: str, limit: int | None) -> Iterator[_Chat]:
    row = 0
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=256, columns=[messages_key]):
                for messages in batch.column(0).to_pylist():
                    if limit is not None and row == limit:
                        return
                    yield _without_answers(row, messages, f"{str(file)!r}, chat {row}")
                    row += 1


def _without_answers(row: int, messages: Any, place: str) -> _Chat:
    if not isinstance(messages, list) or not all(isinstance(turn, dict) and "role" in turn for turn in messages):
        raise DataError(f"{place}, is not a list of {{role, content}} messages")
    asked: list[list[Message]] = [[]]
    for turn in messages:
        if turn["role"] == "assistant":
            asked.append([])
        else:
            # parquet fills the keys that only some messages have.
            asked[-1].append({key: value for key, value in turn.items() if value is not None})
    if not asked[-1]:
        asked.pop()
    if not asked or not all(asked):
        raise DataError(f"{place}, has an assistant turn with nothing before it to answer")
    return _Chat(row, [], asked)


def _answer(
    model: Any, tokenizer: Any, chats: list[_Chat], settings: RegenerationSettings, generator: torch.Generator
) -> None:
    """Answer every question of the chats, turn by turn, all chats of a turn at once."""
    while pending := [chat for chat in chats if chat.asked]:
        for chat in pending:
            chat.answered += chat.asked.pop(0)
        input_ids, attention_mask = encode_prompts(tokenizer, [chat.answered for chat in pending])
        stop_tokens = _stop_tokens(model, tokenizer)
        result = generate(
            model,
            input_ids.to(model.device),
            attention_mask.to(model.device),
            max_new_tokens=settings.max_new_tokens,
            sampling=settings.sampling,
            eos_token_id=stop_tokens,
            generator=None if settings.sampling.is_greedy else generator,
        )
        for chat, tokens in zip(pending, result.tokens, strict=True):
            content = tokenizer.decode(tokens, skip_special_tokens=True)
            chat.answered.append({"role": "assistant", "content": content})
            chat.num_tokens += len(tokens)
            chat.num_cut += tokens[-1] not in stop_tokens


def encode_prompts(tokenizer: Any, conversations: Sequence[list[Message]]) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask` [B, S] of conversations up to where the answer begins, padded on the left."""
    texts = tokenizer.apply_chat_template(list(conversations), tokenize=False, add_generation_prompt=True)
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    longest = max(map(len, rows))
    # Padding is masked out: any token of the vocabulary does for a tokenizer without one.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    input_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    attention_mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return input_ids, attention_mask


def _stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    named = getattr(model.generation_config, "eos_token_id", None)
    return {
        token
        for token in (*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id)
        if token is not None
    }


def _key(model: Any, tokenizer: Any, chats: Sequence[_Chat], settings: RegenerationSettings) -> str:
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
