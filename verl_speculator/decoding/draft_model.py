"""A small language model as drafter, with a key-value cache of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from verl_speculator.decoding.drafters import Draft, DraftContext
from verl_speculator.decoding.target import Target
from verl_speculator.errors import ConfigError


class DraftModel:
    """A `StatefulDrafter` of any causal model with the target's tokens: it drafts greedily, and reads no states.

    Between rounds the cache holds all tokens of a row but the last two. Those are read again: then all rows have two
    tokens to read, whether a round has kept the last draft, which was never read, or not.
    """

    def __init__(self, model: Any, max_draft_tokens: int = 4) -> None:
        """`model` is in eval mode. Raises ConfigError if the number of drafts is not positive."""
        if max_draft_tokens < 1:
            raise ConfigError(f"max_draft_tokens must be at least 1, not {max_draft_tokens}.")
        self.model = model
        self.max_draft_tokens = max_draft_tokens
        self.keep_logits = False
        self._target: Target | None = None
        self._cached: Tensor | None = None  # [B] tokens; None before the first round
        self._width = 0  # slots of the cache between rounds
        self._gained: Tensor  # [B] tokens of the round that has ended

    @property
    def aux_hidden_state_layer_ids(self) -> Sequence[int]:
        return ()

    def start(self, tokens: Tensor, lengths: Tensor, aux_hidden_states: Tensor) -> None:
        self._close()
        self._target = Target(self.model).__enter__()
        self._cached = None

    def advance(self, tokens: Tensor, counts: Tensor, aux_hidden_states: Tensor) -> None:
        self._gained = counts

    def select(self, rows: list[int]) -> None:
        if not rows:
            self._close()
        elif self._cached is not None and self._target is not None:
            # The slots of a row end where those of the last round's cache did, and what it has gained comes after.
            ends = [self._width + gained for gained in self._gained[rows].tolist()]
            self._cached = (self._cached + self._gained)[rows]
            self._width = int(self._cached.max())
            self._target.keep(rows, ends, self._width)

    def propose(self, context: DraftContext, num_tokens: int, generator: torch.Generator | None) -> Draft:
        assert self._target is not None
        if self._cached is None:
            self._read_prompts(self._target, context)
        assert self._cached is not None
        cached, inputs = self._cached, context.tokens[:, -2:]
        tokens: list[Tensor] = []
        all_logits: list[Tensor] = []
        # As for the target: where its positions end nothing of use is drafted, and nothing fails.
        end = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        last = (end or context.tokens.size(1) + num_tokens) - 1
        for _ in range(num_tokens):
            logits = self._target.forward(inputs, cached, last)[1][:, -1]
            tokens.append(logits.argmax(-1))
            if self.keep_logits:
                all_logits.append(logits)
            cached, inputs = cached + inputs.size(1), tokens[-1][:, None]
        return Draft(torch.stack(tokens, dim=1), logits=torch.stack(all_logits, dim=1) if all_logits else None)

    def _read_prompts(self, target: Target, context: DraftContext) -> None:
        self._cached = context.lengths - 2
        self._width = context.tokens.size(1) - 2
        if self._width:
            slots = torch.arange(self._width, device=context.tokens.device)
            mask = slots >= (self._width - self._cached)[:, None]
            target.prefill(context.tokens[:, :-2], mask.long())

    def _close(self) -> None:
        if self._target is not None:
            self._target.__exit__(None, None, None)
            self._target = None
