"""A chat as tokens, by the tokenizer's chat template: the whole of it, and which tokens the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from verl_speculator.data.chats import Message
from verl_speculator.errors import DataError

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Rendered(NamedTuple):
    input_ids: list[int]
    loss_mask: list[int]  # 1 on the assistant's tokens


def apply_template(
    tokenizer: Any,
    messages: Sequence[Message],
    where: str,
    *,
    tools: Sequence[Any] | None = None,
    options: Mapping[str, Any] | None = None,
    **more: Any,
) -> Any:
    """The template's text, or what else `more` asks of `apply_chat_template`.

    Args:
        where: What errors call the chat: flag or key, file and row.
        options: Of the template's own, such as `enable_thinking`.

    Raises:
        DataError: The template refuses it.
    """
    try:
        return tokenizer.apply_chat_template(
            list(messages), tools=tools, **{"tokenize": False, **(options or {}), **more}
        )
    except Exception as error:
        # A template is a program of the model's author, and what it raises has no common type.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"{where}: the chat template refuses it ({reason})") from error


def render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    where: str,
    *,
    tools: Sequence[Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Rendered:
    """A chat, rendered at once. The assistant's tokens are those that the template marks with `{% generation %}`.

    Most templates mark none. An answer then begins where the rendered prompt before it ends, and ends where the chat
    up to and with it does; what a template drops from the beginning of an earlier answer, such as its reasoning, is
    not in the row. For ordinary templates this is what verl's dataset makes of the turns one by one.

    Raises:
        DataError: The template refuses the chat, or its answers cannot be found in what it makes of it.
    """

    def apply(turns: Sequence[Message], **more: Any) -> Any:
        return apply_template(tokenizer, turns, where, tools=tools, options=options, **more)

    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{where}: the tokenizer does not say which text a token stands for, so answers cannot be found in it; "
            "train on tokens that `verl-speculator regenerate` writes"
        )
    if _GENERATION_MARK.search(tokenizer.get_chat_template(tools=tools)):
        marked = apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = list(marked["input_ids"]), [int(is_marked) for is_marked in marked["assistant_masks"]]
        if any(mask):
            # Some authors leave out the token with which the target ends its turn.
            ends = [ids[i] == tokenizer.eos_token_id and mask[i - 1] for i in range(1, len(ids))]
            return Rendered(ids, [mask[0], *(max(m, int(end)) for m, end in zip(mask[1:], ends, strict=True))])
    text = apply(messages)
    spans = _answers_in(text, apply, messages, where)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # A token across the border of an answer is not one that the target writes: its prompt ends there.
    mask = [
        int(any(start <= first and last <= end for start, end in spans)) for first, last in encoded["offset_mapping"]
    ]
    return Rendered(encoded["input_ids"], mask)


def _answers_in(text: str, apply: Callable[..., str], messages: Sequence[Message], where: str) -> list[tuple[int, int]]:
    """Where in the chat's `text` each answer begins and ends."""
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = apply(messages[:turn], add_generation_prompt=True)
        answered = apply(messages[: turn + 1])
        # Not all of the prompt where it ends with what only it has, such as an opened <think>.
        start = _common_prefix(prompt, text)
        answer = answered[_common_prefix(prompt, answered) :]
        kept = next((answer[k:] for k in range(len(answer)) if text.startswith(answer[k:], start)), "")
        if not text.startswith(apply(messages[:turn])) or not kept.strip():
            raise DataError(
                f"{where}: the chat template renders what came before turn {turn + 1} otherwise once it is there, so "
                "the answer cannot be found; mark it with {% generation %} in a template of your own "
                "(model.custom_chat_template), or train on tokens that `verl-speculator regenerate` writes"
            )
        spans.append((start, start + len(kept)))
    return spans


def _common_prefix(one: str, other: str) -> int:
    """The number of characters with which both begin."""
    different = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(different, min(len(one), len(other)))
