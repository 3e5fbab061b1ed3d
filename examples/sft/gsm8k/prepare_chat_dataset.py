#!/usr/bin/env python3
"""Write any chat data as train.parquet and test.parquet with a column `messages` of {role, content}.

    ./prepare_chat_dataset.py chats.jsonl --output data                        a column of messages
    ./prepare_chat_dataset.py sharegpt.json --messages-key conversations --output data
    ./prepare_chat_dataset.py pairs.csv --prompt-key question --response-key answer --output data
    ./prepare_chat_dataset.py HuggingFaceH4/ultrachat_200k --split train_sft --output data

A source is a local .json, .jsonl, .parquet or .csv file, or a data set's name on the Hugging Face hub. Messages may be
{role, content} or ShareGPT's {from, value}. Conversations without an answer of the assistant have nothing to learn
from: they are left out and counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chat_rows import Messages, Row, column, is_local_file, read_rows, report, train_test_split, write_split

from verl_speculator.errors import ConfigError, DataError, SpeculatorError

DEFAULT_MESSAGES_KEY = "messages"

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


def to_messages(value: Any, where: str) -> Messages | None:
    """Messages in the form that training reads; None for a conversation that has nothing to learn from.

    :param where: what errors call the conversation
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{where} is not a JSON list ({error})") from error
    if value is None:
        return None
    if not isinstance(value, list):
        raise DataError(f"{where} must be a list of messages, not {type(value).__name__}")
    messages = [_to_message(message, where) for message in value]
    whole = [message for message in messages if message is not None]
    has_answer = any(message["role"] == "assistant" and message["content"].strip() for message in whole)
    return whole if has_answer and len(whole) == len(messages) else None


def pair_to_messages(row: Row, options: argparse.Namespace, source: str) -> Messages | None:
    """A prompt and its response, after a system message if there is a column for it."""
    roles = {"system": options.system_key, "user": options.prompt_key, "assistant": options.response_key}
    texts = {role: column(row, key, source) for role, key in roles.items() if key}
    for role, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise DataError(f"column {roles[role]!r} of {source!r} must hold text, not {type(text).__name__}")
    texts = {role: text for role, text in texts.items() if text is not None and text.strip()}
    if not {"user", "assistant"} <= set(texts):
        return None
    return [{"role": role, "content": text} for role, text in texts.items()]


def convert(rows: Sequence[Row], options: argparse.Namespace, source: str) -> list[Messages]:
    """The usable conversations of a source.

    :raises DataError: a column is missing or of another shape, or nothing is usable
    """
    usable = []
    for number, row in enumerate(rows, start=1):
        if options.prompt_key:
            messages = pair_to_messages(row, options, source)
        else:
            value = column(row, options.messages_key, source)
            messages = to_messages(value, f"column {options.messages_key!r} in row {number} of {source!r}")
        if messages is not None:
            usable.append(messages)
    if not usable:
        raise DataError(f"{source!r} has no conversation with an answer of the assistant")
    if len(usable) < len(rows):
        print(f"{len(rows) - len(usable):>8} of {len(rows)} rows of {source} left out: empty or without an answer")
    return usable


def _to_message(message: Any, where: str) -> dict[str, str] | None:
    """None where the text is missing, as in a message that only calls a tool."""
    if not isinstance(message, Mapping):
        raise DataError(f"{where} must hold messages, not {type(message).__name__}")
    for role_key, text_key in (("role", "content"), ("from", "value")):
        if role_key in message and text_key in message:
            break
    else:
        raise DataError(
            f"{where} has a message with the keys {', '.join(map(str, message))}; "
            "it needs role and content, or from and value"
        )
    name, text = message[role_key], message[text_key]
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"{where} has a message of {name!r}; known are {', '.join(ROLES)}")
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where} has a message whose {text_key} is no text but {type(text).__name__}")
    return None if text is None else {"role": role, "content": text}


def check_options(options: argparse.Namespace) -> None:
    if (options.prompt_key is None) != (options.response_key is None):
        raise ConfigError("--prompt-key and --response-key go together")
    if options.prompt_key and options.messages_key:
        raise ConfigError("give --messages-key, or --prompt-key and --response-key, not both")
    if options.system_key and not options.prompt_key:
        raise ConfigError("--system-key needs --prompt-key and --response-key")
    if options.test_split and options.test_source:
        raise ConfigError("give --test-source or --test-split, not both")
    if options.test_split and is_local_file(options.source):
        raise ConfigError("--test-split is for data sets of the hub: name a local file with --test-source")
    if options.max_rows is not None and options.max_rows < 1:
        raise ConfigError(f"--max-rows must be at least 1, got {options.max_rows}")
    options.messages_key = options.messages_key or DEFAULT_MESSAGES_KEY


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a local file, or a data set's name on the hub")
    parser.add_argument("--output", type=Path, required=True, help="folder for train.parquet and test.parquet")
    parser.add_argument("--messages-key", help=f"column of messages; default: {DEFAULT_MESSAGES_KEY}")
    parser.add_argument("--prompt-key", help="column of prompts, with --response-key instead of --messages-key")
    parser.add_argument("--response-key", help="column of responses")
    parser.add_argument("--system-key", help="column of system messages, next to --prompt-key")
    parser.add_argument("--split", default="train", help="split of a hub data set; default: %(default)s")
    parser.add_argument("--subset", help="subset (configuration) of a hub data set")
    parser.add_argument("--test-split", help="split of the same data set for test.parquet")
    parser.add_argument("--test-source", help="another source for test.parquet")
    parser.add_argument("--test-fraction", type=float, default=0.05, help="held out otherwise; default: %(default)s")
    parser.add_argument("--max-rows", type=int, help="use only the first rows")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle before splitting; default: %(default)s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        check_options(options)
        train = convert(
            read_rows(options.source, options.split, options.subset)[: options.max_rows], options, options.source
        )
        if options.test_source or options.test_split:
            source = options.test_source or options.source
            test = convert(read_rows(source, options.test_split or options.split, options.subset), options, source)
        else:
            train, test = train_test_split(train, options.test_fraction, options.seed)
        write_split(train, options.output.expanduser() / "train.parquet")
        if test:
            write_split(test, options.output.expanduser() / "test.parquet")
    except SpeculatorError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
