"""Chats as tokens: what a base model is asked, the answer that it is compared with, and batches of such prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from verl_speculator.data.chats import Chat, Message
from verl_speculator.data.rendering import apply_template
from verl_speculator.errors import ConfigError, DataError

_MAX_ROWS_NAMED = 3


@dataclass(frozen=True)
class Prompt:
    """A chat as tokens: `prompt_ids` up to where the answer begins, `answer_ids` those of the reference, if any."""

    chat: Chat
    prompt_ids: list[int]
    answer_ids: list[int]


def encode_chats(chats: Sequence[Chat], tokenizer: Any) -> list[Prompt]:
    """Tokens of the chats, by the tokenizer's chat template.

    The reference answer is what the template adds to the prompt for the assistant's turn, up to and with the token that
    ends it; where a template writes earlier turns differently once an answer follows, it is the answer's bare text.

    Raises:
        DataError: The template refuses a chat.
    """
    prompts = []
    for chat in chats:
        where = f"--data: {chat.where}"
        text, prompt_ids = encode_prompt(tokenizer, chat.asked, where, tools=chat.tools)
        answer_ids: list[int] = []
        if chat.answer is not None:
            both = apply_template(tokenizer, [*chat.asked, chat.answer], where, tools=chat.tools)
            answer = both.removeprefix(text) if both.startswith(text) else str(chat.answer.get("content") or "")
            answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            if tokenizer.eos_token_id in answer_ids:
                answer_ids = answer_ids[: answer_ids.index(tokenizer.eos_token_id) + 1]
        prompts.append(Prompt(chat, prompt_ids, answer_ids))
    return prompts


def encode_prompt(
    tokenizer: Any,
    messages: Sequence[Message],
    where: str,
    *,
    tools: Sequence[Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[str, list[int]]:
    """Text and tokens of a conversation up to where the assistant's next answer begins; arguments of `apply_template`.

    Raises:
        DataError: The template refuses it.
    """
    text = apply_template(tokenizer, messages, where, tools=tools, options=options, add_generation_prompt=True)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise DataError(f"{where}, makes a prompt without tokens")
    return text, tokens


def left_pad(rows: Sequence[Sequence[int]], tokenizer: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask`, both `[B, S]`, of prompts of different lengths."""
    width = max(map(len, rows))
    # Padding is masked out: any token of the vocabulary does for a tokenizer without one.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    input_ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return input_ids, mask


def split_by_length(
    prompts: Sequence[Prompt], context: int | None, max_new_tokens: int
) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts that leave room for their answers in the base's `context` positions, and those that are too long.

    Args:
        context: None: the base has no limit.

    Raises:
        SpeculatorError: No prompt is left.
    """
    if context is None:
        return list(prompts), []
    room = context - max_new_tokens
    if room < 1:
        raise ConfigError(
            f"--max-new-tokens={max_new_tokens} leaves no room for a prompt in the {context} positions of the base: "
            "lower it"
        )
    fitting = [prompt for prompt in prompts if len(prompt.prompt_ids) <= room]
    too_long = [prompt for prompt in prompts if len(prompt.prompt_ids) > room]
    if too_long and not fitting:
        shortest = min(len(prompt.prompt_ids) for prompt in too_long)
        raise DataError(
            f"--data: {name_rows(too_long)} too long: the shortest has {shortest} tokens where {context} positions of "
            f"the base less --max-new-tokens={max_new_tokens} leave {room}: lower --max-new-tokens or take other chats"
        )
    return fitting, too_long


def name_rows(prompts: Sequence[Prompt]) -> str:
    """How many prompts, and which: `5 prompts (chats.parquet, row 0, ... and 2 more) are`."""
    rows = "; ".join(prompt.chat.where for prompt in prompts[:_MAX_ROWS_NAMED])
    more = f" and {len(prompts) - _MAX_ROWS_NAMED} more" if len(prompts) > _MAX_ROWS_NAMED else ""
    return (
        f"{len(prompts)} prompt{'s' if len(prompts) > 1 else ''} ({rows}{more}) {'are' if len(prompts) > 1 else 'is'}"
    )
