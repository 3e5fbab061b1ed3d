"""A chat while a target answers it, turn by turn, and the rows of tokens that come of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from verl_speculator.data.chats import Chat, Message
from verl_speculator.data.rendering import apply_template
from verl_speculator.errors import DataError

# Some tokenizers tidy up the spaces before punctuation unless told not to.
_AS_IT_IS = {"clean_up_tokenization_spaces": False}


@dataclass
class Conversation:
    """What has been said so far, as messages and as tokens, and what is still to be asked.

    A row of training data goes on over the turns as long as the chat template leaves the earlier ones as they were
    written. Where it does not, because it drops reasoning, say, or an answer's outer spaces, the target is served
    another prompt than what it has written: then the rest of the chat is a row of its own, and what was said before is
    context in it.

    Attributes:
        row: Of the chat, counted over all files; `sample` tells several answers to it apart.
        asked: What leads up to each answer that is still to be given.
        rows: Those that are finished: `messages`, `input_ids` and `loss_mask` of each.
        num_cut: Answers that reached the limit before the target ended them.
        is_too_long: It ended early, because the context of the target does not hold the next prompt and its answer.
    """

    row: int
    sample: int
    where: str
    tools: list[Any] | None
    asked: list[list[Message]]
    said: list[Message] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    num_answers: int = 0
    num_tokens: int = 0
    num_cut: int = 0
    is_too_long: bool = False
    _input_ids: list[int] = field(default_factory=list)
    _loss_mask: list[int] = field(default_factory=list)
    _text: str = ""  # what the tokens say

    @classmethod
    def of(cls, chat: Chat, row: int, sample: int) -> Conversation:
        """The chat without its answers; one that ends with a question gets an answer too.

        Raises:
            DataError: An answer has nothing before it to answer.
        """
        asked: list[list[Message]] = [[]]
        for turn in chat.asked:
            if turn["role"] == "assistant":
                asked.append([])
            else:
                asked[-1].append(turn)
        if not all(asked):
            raise DataError(f"--data: {chat.where}, has an assistant turn with nothing before it to answer")
        return cls(row, sample, f"--data: {chat.where}", chat.tools, asked)

    def digest(self) -> str:
        """Of what is asked."""
        return hashlib.sha256(json.dumps([self.asked, self.tools], sort_keys=True).encode()).hexdigest()[:16]

    def ask(self, tokenizer: Any, options: Mapping[str, Any], room: int | None) -> list[int] | None:
        """The prompt of the next answer as tokens; None, and the end, if it has more than `room`.

        Raises:
            DataError: The chat template refuses it.
        """
        messages = [*self.said, *self.asked.pop(0)]
        text = apply_template(
            tokenizer, messages, self.where, tools=self.tools, options=options, add_generation_prompt=True
        )
        added = _tokens_after(tokenizer, text, self._text)
        if added is None:
            added = _tokens_after(tokenizer, text, "") or []
            self._end_row()
        if not self._input_ids and not added:
            raise DataError(f"{self.where}, makes a prompt without tokens")
        prompt = self._input_ids + added
        if room is not None and len(prompt) > room:
            self.is_too_long, self.asked = True, []
            self._end_row()
            return None
        self.said, self._text = messages, text
        self._input_ids, self._loss_mask = prompt, self._loss_mask + [0] * len(added)
        return prompt

    def take(self, tokens: Sequence[int], tokenizer: Any, stop_tokens: Collection[int]) -> None:
        """The target's answer to the last prompt, with the token that ended it, if one did."""
        before = tokenizer.decode(self._input_ids, **_AS_IT_IS)
        self._input_ids = [*self._input_ids, *tokens]
        self._loss_mask += [1] * len(tokens)
        # Not of the answer alone: some tokenizers then drop the space before its first word.
        self._text += tokenizer.decode(self._input_ids, **_AS_IT_IS)[len(before) :]
        content = tokenizer.decode(tokens, skip_special_tokens=True, **_AS_IT_IS)
        self.said.append({"role": "assistant", "content": content})
        self.num_answers += 1
        self.num_tokens += len(tokens)
        self.num_cut += tokens[-1] not in stop_tokens
        if not self.asked:
            self._end_row()

    def _end_row(self) -> None:
        if 1 in self._loss_mask:
            row = {"messages": list(self.said), "input_ids": self._input_ids, "loss_mask": self._loss_mask}
            self.rows.append(row)
        self._input_ids, self._loss_mask, self._text = [], [], ""


def _tokens_after(tokenizer: Any, text: str, begin: str) -> list[int] | None:
    """Of a text that begins so, the tokens of the rest; None if it begins otherwise or a token crosses the border."""
    if not text.startswith(begin):
        return None
    if not getattr(tokenizer, "is_fast", False):
        # It does not say where in the text a token stands.
        return tokenizer(text[len(begin) :], add_special_tokens=False)["input_ids"]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    if any(first < len(begin) < last for first, last in offsets):
        return None
    return [token for token, (first, _) in zip(encoded["input_ids"], offsets, strict=True) if first >= len(begin)]
