"""The prompts of chat data: what a chat says up to the answer, and the answer as a reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from verl_speculator.errors import ConfigError, DataError

_MAX_ROWS_NAMED = 3


@dataclass(frozen=True)
class Chat:
    """A row of the data without its last assistant turn, which is the reference answer where there is one."""

    file: str
    row: int  # in its file, from 0
    messages: list[dict[str, Any]]
    answer: dict[str, Any] | None

    @property
    def request(self) -> str:
        """The last message before the answer."""
        return str(self.messages[-1]["content"])

    @property
    def place(self) -> str:
        return f"{self.file!r}, row {self.row}"


@dataclass(frozen=True)
class Prompt:
    """A chat as tokens: `prompt_ids` up to where the answer begins, `answer_ids` those of the reference, if any."""

    chat: Chat
    prompt_ids: list[int]
    answer_ids: list[int]


def read_chats(files: Sequence[str], messages_key: str, limit: int | None) -> list[Chat]:
    """The first `limit` chats of parquet files that `check_chat_file` has accepted.

    :raises DataError: a row that holds nothing to answer, or not a single row
    """
    chats: list[Chat] = []
    for file, row, messages in _rows(files, messages_key):
        if limit is not None and len(chats) == limit:
            break
        chats.append(_split(file, row, messages))
    if not chats:
        raise DataError(f"--data: {', '.join(map(repr, files))} holds no chat")
    return chats


def _rows(files: Sequence[str], messages_key: str) -> Iterator[tuple[str, int, Any]]:
    for file in files:
        row = 0
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=64, columns=[messages_key]):
                for messages in batch.column(0).to_pylist():
                    yield file, row, messages
                    row += 1


def _split(file: str, row: int, messages: Any) -> Chat:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"--data: {file!r}, row {row}, is not a list of messages")
    # parquet fills the keys that only some messages have.
    turns = [{key: value for key, value in message.items() if value is not None} for message in messages]
    ends_with_answer = bool(turns) and turns[-1].get("role") == "assistant"
    before = turns[:-1] if ends_with_answer else turns
    if not before or any("role" not in turn or "content" not in turn for turn in before):
        raise DataError(
            f"--data: {file!r}, row {row}, has nothing to answer: a chat needs messages of {{role, content}} "
            "before the assistant's last one"
        )
    return Chat(file, row, before, turns[-1] if ends_with_answer else None)


def encode(chats: Sequence[Chat], tokenizer: Any) -> list[Prompt]:
    """Tokens of the chats, by the tokenizer's chat template.

    The reference answer is what the template adds to the prompt for the assistant's turn, up to and with the token that
    ends it; where a template writes earlier turns differently once an answer follows, it is the answer's bare text.

    :raises ConfigError: there is no chat template
    :raises DataError: the template refuses a chat
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "--base: its tokenizer has no chat template; use an instruction-tuned model or give one with "
            "--chat-template FILE"
        )
    return [_encode(chat, tokenizer) for chat in chats]


def _encode(chat: Chat, tokenizer: Any) -> Prompt:
    text = _apply_template(tokenizer, chat, chat.messages, add_generation_prompt=True)
    prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not prompt_ids:
        raise DataError(f"--data: {chat.place}, makes a prompt without tokens")
    answer_ids: list[int] = []
    if chat.answer is not None:
        whole = _apply_template(tokenizer, chat, [*chat.messages, chat.answer], add_generation_prompt=False)
        answer = whole.removeprefix(text) if whole.startswith(text) else str(chat.answer.get("content") or "")
        answer_ids = _up_to(tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    return Prompt(chat, prompt_ids, answer_ids)


def _apply_template(tokenizer: Any, chat: Chat, messages: list[dict[str, Any]], **options: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:
        # A template is a program of the model's author, and what it raises has no common type.
        raise DataError(f"--data: the chat template refuses {chat.place} ({_first_line(error)})") from error


def _up_to(tokens: list[int], end: int | None) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def check_lengths(prompts: Sequence[Prompt], context: int | None, max_new_tokens: int) -> None:
    """Raise `DataError` if a prompt and its answer need more positions than the base has; None: it has no limit."""
    if context is None:
        return
    room = context - max_new_tokens
    if room < 1:
        raise ConfigError(
            f"--max-new-tokens={max_new_tokens} leaves no room for a prompt in the {context} positions of the base: "
            "lower it"
        )
    long = [prompt for prompt in prompts if len(prompt.prompt_ids) > room]
    if not long:
        return
    rows = ", ".join(str(prompt.chat.row) for prompt in long[:_MAX_ROWS_NAMED])
    more = f" and {len(long) - _MAX_ROWS_NAMED} more" if len(long) > _MAX_ROWS_NAMED else ""
    longest = max(long, key=lambda prompt: len(prompt.prompt_ids))
    raise DataError(
        f"--data: {len(long)} of {len(prompts)} prompts (row{'s' if len(long) > 1 else ''} {rows}{more}) are too long, "
        f"the longest, {longest.chat.place}, with {len(longest.prompt_ids)} tokens where {context} positions of the "
        f"base less --max-new-tokens={max_new_tokens} leave {room}: lower --max-new-tokens or leave such rows out"
    )
