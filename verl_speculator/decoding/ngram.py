"""Drafts without a model: the text so far is copied from where its last tokens occurred before."""

from __future__ import annotations

import torch
from torch import Tensor

from verl_speculator.decoding.drafters import Draft, DraftContext
from verl_speculator.errors import ConfigError


class NgramDrafter:
    """Prompt lookup (Saxena 2023, "prompt lookup decoding"), the baseline that every speculator has to beat.

    The last `max_ngram` tokens are looked for in prompt and generated text; then one token fewer, down to `min_ngram`.
    What followed the first occurrence is proposed: up to `max_draft_tokens` tokens, fewer where the text ends. A row
    without any occurrence proposes nothing. Both choices are vLLM's.
    """

    def __init__(self, max_draft_tokens: int = 3, *, max_ngram: int = 3, min_ngram: int = 1) -> None:
        """Raises ConfigError for numbers that are not positive, or `min_ngram` above `max_ngram`."""
        if max_draft_tokens < 1:
            raise ConfigError(f"max_draft_tokens must be at least 1, not {max_draft_tokens}.")
        if not 1 <= min_ngram <= max_ngram:
            raise ConfigError(f"min_ngram={min_ngram} must be at least 1 and at most max_ngram={max_ngram}.")
        self.max_draft_tokens = max_draft_tokens
        self.max_ngram, self.min_ngram = max_ngram, min_ngram

    def propose(self, context: DraftContext, num_tokens: int, generator: torch.Generator | None) -> Draft:
        follow = _first_continuation(context.tokens, context.lengths, self.max_ngram, self.min_ngram)
        total = context.tokens.size(1)
        lengths = (total - follow).clamp(min=0, max=num_tokens)
        offsets = torch.arange(num_tokens, device=follow.device)
        places = (follow[:, None] + offsets).clamp(max=total - 1)
        return Draft(context.tokens.gather(1, places), lengths)


def _first_continuation(tokens: Tensor, lengths: Tensor, max_ngram: int, min_ngram: int) -> Tensor:
    """Where the text goes on `[B]` after the first earlier occurrence of its longest known ending; L where none is."""
    total = tokens.size(1)
    follow = torch.full_like(lengths, total)
    for size in range(max_ngram, min_ngram - 1, -1):
        if size >= total:
            continue
        starts = torch.arange(total - size, device=tokens.device)  # the last n-gram itself starts at total - size
        windows = tokens.unfold(1, size, 1)  # [B, total - size + 1, size]
        same = (windows[:, :-1] == windows[:, -1:]).all(-1) & (starts >= (total - lengths)[:, None])
        found = same.any(-1) & (follow == total)
        follow = torch.where(found, same.int().argmax(-1) + size, follow)
    return follow
