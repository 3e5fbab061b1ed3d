"""The scorer as an acceptance rule of decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from verl_speculator.decoding.acceptance import Verification
from verl_speculator.scorer.model import ScoringActor


class ScorerRule:
    """Accepts a mismatch from a score on: that of one scorer, or the mean of an ensemble's."""

    def __init__(self, scorers: ScoringActor | Sequence[ScoringActor], threshold: float | None = None) -> None:
        """`threshold` None takes the first scorer's own."""
        self.scorers = [scorers] if isinstance(scorers, ScoringActor) else list(scorers)
        self.threshold = self.scorers[0].scoring_config.threshold if threshold is None else threshold

    @property
    def needs_draft_logits(self) -> bool:
        return any(scorer.needs_draft_logits for scorer in self.scorers)

    @property
    def target_calls(self) -> int:
        return sum(scorer.target_calls for scorer in self.scorers)

    def scores(self, verification: Verification) -> Tensor:
        """[B, k], from 0 to 1."""
        return torch.stack([scorer.score_tokens(verification) for scorer in self.scorers]).mean(0)

    def accepts(self, verification: Verification) -> Tensor:
        return self.scores(verification) >= self.threshold
