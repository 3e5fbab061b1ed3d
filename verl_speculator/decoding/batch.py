"""The rows that are still being decoded, and what each has said so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verl_speculator.decoding.drafters import DraftContext
from verl_speculator.decoding.target import Target, keep_slots


class Batch:
    """One entry per unfinished row everywhere; `row_ids` says which rows of the call they are."""

    def __init__(self, target: Target, tokens: Tensor, hidden: Tensor, lengths: list[int]) -> None:
        self.row_ids = list(range(len(lengths)))
        self._target = target
        self._tokens = tokens  # [B, cache slots + 1], padded on the left; the last token is not in the cache yet
        self._hidden = hidden  # [B, H], predicted the last token
        self._lengths = lengths  # cached tokens
        self._prompt_lengths = lengths  # of all rows of the call

    def context(self) -> DraftContext:
        return DraftContext(self._hidden, self._tokens, self._cached() + 1)

    def prompt_lengths(self) -> Tensor:
        """Tokens of the rows' prompts, [B]."""
        return torch.tensor([self._prompt_lengths[row] for row in self.row_ids], device=self._tokens.device)

    def no_drafts(self) -> Tensor:
        return self._tokens[:, :0]

    def forward(self, drafts: Tensor, max_position: int) -> tuple[Tensor, Tensor]:
        """Hidden states `[B, k + 1, H]` and logits `[B, k + 1, V]` of the last token and `drafts [B, k]`."""
        inputs = torch.cat([self._tokens[:, -1:], drafts], dim=1)
        return self._target.forward(inputs, self._cached(), max_position)

    def advance(self, rows: list[int], accepted: list[int], tokens: Tensor, hidden: Tensor) -> None:
        """Go on with `rows` (indices into this batch), each longer by the first `accepted + 1` of its `tokens`.

        `tokens` are `[B, k + 1]`, `hidden [B, k + 1, H]` predicted them. What was rejected leaves the cache.
        """
        slots = self._tokens.size(1)  # filled before this round's drafts: it cached the last token
        last = hidden[torch.arange(len(accepted), device=hidden.device), torch.tensor(accepted, device=hidden.device)]
        self._lengths = [length + new + 1 for length, new in zip(self._lengths, accepted, strict=True)]
        self._select(rows, [slots + new for new in accepted], torch.cat([self._tokens, tokens], dim=1), last)

    def keep(self, rows: list[int]) -> None:
        """Go on with `rows` (indices into this batch) as they are."""
        slots = self._tokens.size(1) - 1
        self._select(rows, [slots] * len(self.row_ids), self._tokens, self._hidden)

    def _select(self, rows: list[int], ends: list[int], tokens: Tensor, hidden: Tensor) -> None:
        """Of the rows that stay, keep no more slots before `ends` than the longest needs."""
        self.row_ids = [self.row_ids[row] for row in rows]
        self._lengths = [self._lengths[row] for row in rows]
        if rows:
            width = max(self._lengths)
            ends = [ends[row] for row in rows]
            self._target.keep(rows, ends, width)
            self._tokens = keep_slots(tokens, rows, [end + 1 for end in ends], width + 1, dim=1)
            self._hidden = hidden[rows]

    def _cached(self) -> Tensor:
        return torch.tensor(self._lengths, device=self._tokens.device)


@dataclass(frozen=True)
class Limits:
    """When a row ends: after `max_new_tokens`, or with one of `stop_tokens`."""

    max_new_tokens: int
    stop_tokens: frozenset[int]


class Transcript:
    """Per row, the generated tokens and what became of its drafts."""

    def __init__(self, first_tokens: list[int], limits: Limits) -> None:
        self.tokens = [[token] for token in first_tokens]
        self.accepted: list[list[int]] = [[] for _ in first_tokens]
        self.drafted: list[list[int]] = [[] for _ in first_tokens]
        self.lossy: list[list[int]] = [[] for _ in first_tokens]  # places in `tokens` of accepted mismatches
        self.scoring_calls = [0] * len(first_tokens)
        self._limits = limits

    def add_round(self, row: int, tokens: list[int], accepted: int, drafted: int) -> None:
        """The row's next `accepted + 1` of `tokens`, as far as its limits let it go on."""
        room = self._limits.max_new_tokens - len(self.tokens[row])
        for token in tokens[: min(accepted + 1, room)]:
            self.tokens[row].append(token)
            if token in self._limits.stop_tokens:
                break
        self.accepted[row].append(accepted)
        self.drafted[row].append(drafted)

    def add_lossy(self, row: int, slots: list[int], calls: int) -> None:
        """Of the round that `add_round` is about to add: drafts that only a rule accepted, and what asking it cost."""
        begin = len(self.tokens[row])
        self.lossy[row] += [begin + slot for slot in slots if begin + slot < self._limits.max_new_tokens]
        self.scoring_calls[row] += calls

    def unfinished(self, rows: list[int]) -> list[int]:
        """The places in `rows` of those that go on."""
        return [place for place, row in enumerate(rows) if not self._is_finished(self.tokens[row])]

    def _is_finished(self, tokens: list[int]) -> bool:
        return len(tokens) >= self._limits.max_new_tokens or tokens[-1] in self._limits.stop_tokens
