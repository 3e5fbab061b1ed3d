"""What decoding yields: the tokens, how they came about, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

from verl_speculator.decoding.metrics import AcceptanceCounts, TargetForwards
from verl_speculator.decoding.times import DecodingTimes


@dataclass(frozen=True)
class DecodingResult:
    """Generated tokens (the end token included) and what they cost.

    A round is one forward pass of the target after the prompt's. `accepted_per_round[row]` holds one number for every
    round of that row: how many drafts the target kept, so that the row gained one token more than that (fewer where it
    ended). As in vLLM's counters, tokens past the end of the row count when they were verified in its last round.
    """

    tokens: list[list[int]]
    num_target_forwards: int  # of the whole batch, the prompt's included
    num_draft_tokens: int  # the most drafted per round; 0 for plain decoding
    accepted_per_round: list[list[int]]
    drafted_per_round: list[list[int]] | None = None  # None: `num_draft_tokens` in every round
    times: DecodingTimes = field(default_factory=DecodingTimes)
    # With a lossy rule: per row, which places of `tokens` hold drafts that the target would not have written, and how
    # many forwards of the target's size the rule took. None: decoding was lossless.
    lossy_tokens: list[list[int]] | None = None
    scoring_calls: list[int] | None = None

    @property
    def is_lossy(self) -> bool:
        """Whether an acceptance rule was at work, so that the tokens need not be the target's own."""
        return self.lossy_tokens is not None

    @property
    def target_calls(self) -> list[int]:
        """Forward passes of the target's size per row: the prompt's, one a round, and a rule's own."""
        scoring = self.scoring_calls or [0] * len(self.tokens)
        return [1 + len(rounds) + calls for rounds, calls in zip(self.accepted_per_round, scoring, strict=True)]

    @property
    def num_rounds(self) -> int:
        """Rounds of the whole batch: what `times.draft` and `times.verify` were spent on."""
        return self.num_target_forwards - 1

    @property
    def accepted_per_draft(self) -> list[list[int]]:
        """`accepted_per_round` without the rounds in which the row had no draft."""
        return [
            [kept for kept, offered in zip(accepted, drafted, strict=True) if offered]
            for accepted, drafted in zip(self.accepted_per_round, self._drafted(), strict=True)
        ]

    @property
    def num_drafts(self) -> list[int]:
        """Per row, the rounds that verified a draft."""
        return [len(accepted) for accepted in self.accepted_per_draft]

    @property
    def num_accepted_tokens(self) -> list[int]:
        """Accepted draft tokens per row."""
        return [sum(accepted) for accepted in self.accepted_per_round]

    @property
    def counts_per_row(self) -> list[AcceptanceCounts]:
        return [
            AcceptanceCounts.from_rounds(accepted, drafted, self.num_draft_tokens)
            for accepted, drafted in zip(self.accepted_per_round, self._drafted(), strict=True)
        ]

    @property
    def counts(self) -> AcceptanceCounts:
        accepted, drafted = (list(chain.from_iterable(rows)) for rows in (self.accepted_per_round, self._drafted()))
        return AcceptanceCounts.from_rounds(accepted, drafted, self.num_draft_tokens)

    @property
    def acceptance_length(self) -> float:
        """1 + accepted / drafts, over all rows."""
        return self.counts.acceptance_length

    @property
    def target_forwards(self) -> TargetForwards:
        """What every row alone would take: forwards for its tokens with and without drafts."""
        return TargetForwards(
            plain=sum(map(len, self.tokens)),
            used=sum(self.target_calls),
        )

    def _drafted(self) -> list[list[int]]:
        if self.drafted_per_round is not None:
            return self.drafted_per_round
        return [[self.num_draft_tokens] * len(accepted) for accepted in self.accepted_per_round]
