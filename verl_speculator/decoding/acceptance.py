"""Which drafts to keep although the target would have written another token: decoding with any of these is lossy.

A rule sees all that verification has computed anyway and answers for every draft; decoding asks it about mismatches
only. Drafts that lossless verification keeps are kept whatever a rule says, and what decides where a text ends is never
overridden. Without a rule decoding is lossless, bit by bit as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from verl_speculator.decoding.batch import Batch
from verl_speculator.decoding.drafters import Draft


@dataclass(frozen=True)
class Verification:
    """One round's forward of the target over B rows with k drafts each.

    Slot i is that of draft i. `hidden_states[:, i]` and `logits[:, i]` are what the target has before it reads draft i:
    they choose the token that it would have written there. `[:, i + 1]` is what it has after reading draft i.

    Attributes:
        tokens: [B, L], prompt and generated tokens, padded on the left; the last column is the last token.
        context_lengths: [B], how many of the L are tokens and not padding.
        prompt_lengths: [B], how many of these are the prompt's.
        drafts: [B, k].
        lengths: [B], how many of the k each row proposes.
        target_tokens: [B, k + 1], the target's most likely token at each slot and after the last.
        logits: [B, k + 1, V].
        hidden_states: [B, k + 1, H], the input of `lm_head`.
        draft_logits: [B, k, V], the drafter's own; None unless decoding was asked to keep them.
        matches: [B, k], bool: what lossless verification keeps. Greedily that is `drafts == target_tokens`.
        stop_tokens: They end a text.
        rows: Which rows of the call these are: rows that have ended are gone.
    """

    tokens: Tensor
    context_lengths: Tensor
    prompt_lengths: Tensor
    drafts: Tensor
    lengths: Tensor
    target_tokens: Tensor
    logits: Tensor
    hidden_states: Tensor
    draft_logits: Tensor | None
    matches: Tensor
    stop_tokens: frozenset[int]
    rows: list[int]

    @property
    def drafted(self) -> Tensor:
        """[B, k], bool: slots that hold a draft."""
        return torch.arange(self.drafts.size(1), device=self.drafts.device) < self.lengths[:, None]

    @property
    def positions(self) -> Tensor:
        """[B, k]: how many tokens of the answer stand before each slot."""
        generated = self.context_lengths - self.prompt_lengths
        return generated[:, None] + torch.arange(self.drafts.size(1), device=self.drafts.device)

    @property
    def mismatches(self) -> Tensor:
        """[B, k], bool: the slots that a rule is asked about, as if all before them had been kept.

        Where draft or target ends the text, nothing is asked: the target decides.
        """
        asked = self.drafted & ~self.matches
        for token in self.stop_tokens:
            asked &= (self.drafts != token) & (self.target_tokens[:, :-1] != token)
        return asked

    def kept(self, accepts: Tensor) -> Tensor:
        """[B, k], bool: the drafts that stay if a rule's answer is `accepts` [B, k]; once one goes, all after it do."""
        keep = (self.drafted & self.matches) | (self.mismatches & accepts)
        return keep.long().cumprod(dim=1).bool()

    def judged(self, accepts: Tensor) -> Tensor:
        """[B, k], bool: the mismatches that were decided on: those up to and with the first that was rejected."""
        kept = self.kept(accepts)
        before = torch.cat([torch.ones_like(kept[:, :1]), kept[:, :-1]], dim=1)
        return self.mismatches & before


class AcceptanceRule(Protocol):
    """Decides on mismatches. All built in are lossy."""

    @property
    def needs_draft_logits(self) -> bool:
        """Whether it compares with the drafter's own distribution."""
        ...

    @property
    def target_calls(self) -> int:
        """Forwards of the target's size that a row costs it in a round in which it is asked."""
        ...

    def accepts(self, verification: Verification) -> Tensor:
        """[B, k], bool; only the answers at `verification.mismatches` count."""
        ...


class Relaxation:
    """A rule at work on one round: from the drafts that are kept losslessly to those that are kept instead."""

    def __init__(
        self,
        rule: AcceptanceRule,
        batch: Batch,
        draft: Draft,
        hidden_states: Tensor,
        logits: Tensor,
        stop_tokens: frozenset[int],
    ) -> None:
        self._rule = rule
        self._batch = batch
        self._draft = draft
        self._hidden_states = hidden_states
        self._logits = logits
        self._stop_tokens = stop_tokens

    def __call__(self, matches: Tensor) -> Tensor:
        context, draft = self._batch.context(), self._draft
        everywhere = torch.full_like(context.lengths, draft.tokens.size(1))
        verification = Verification(
            tokens=context.tokens,
            context_lengths=context.lengths,
            prompt_lengths=self._batch.prompt_lengths(),
            drafts=draft.tokens,
            lengths=everywhere if draft.lengths is None else draft.lengths,
            target_tokens=self._logits.argmax(-1),
            logits=self._logits,
            hidden_states=self._hidden_states,
            draft_logits=draft.logits,
            matches=matches,
            stop_tokens=self._stop_tokens,
            rows=list(self._batch.row_ids),
        )
        mismatches = verification.mismatches
        self._asked = mismatches.any(dim=1)
        if not bool(self._asked.any()):
            self._lossy = mismatches
            return matches
        kept = verification.kept(self._rule.accepts(verification))
        self._lossy = kept & mismatches
        return kept

    def lossy_slots(self, accepted: list[int]) -> list[list[int]]:
        """Per row, which of its first `accepted` drafts only the rule has kept."""
        return [
            [slot for slot, lossy in enumerate(row[:count]) if lossy]
            for row, count in zip(self._lossy.tolist(), accepted, strict=True)
        ]

    def calls(self) -> list[int]:
        """Per row, forwards of the target's size that asking the rule took."""
        return (self._asked.long() * self._rule.target_calls).tolist()
