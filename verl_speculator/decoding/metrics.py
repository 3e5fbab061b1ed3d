"""The arithmetic of acceptance: counts are summed over rounds, rows and ranks, and divided once at the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass
class AcceptanceCounts:
    """What was drafted and what the target accepted, counted the way vLLM's `spec_decode_*` counters do.

    A draft is one verification round of one row that had something to verify; `num_rounds` also counts those without.
    `accepted_per_position[i]` counts the drafts whose first `i + 1` tokens were all accepted (the joint event, not the
    conditional one).
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    num_rounds: int = 0

    @classmethod
    def from_drafts(cls, accepted: Iterable[int], num_draft_tokens: int) -> AcceptanceCounts:
        """Counts of drafts of `num_draft_tokens` tokens each, of which `accepted` (one number per draft) were kept."""
        kept = list(accepted)
        return cls.from_rounds(kept, [num_draft_tokens] * len(kept), num_draft_tokens)

    @classmethod
    def from_rounds(cls, accepted: Sequence[int], drafted: Sequence[int], max_draft_tokens: int) -> AcceptanceCounts:
        """Counts of rounds that drafted `drafted` tokens, of which `accepted` were kept: one number of each per round.

        A round that drafted nothing is a round but no draft. Raises ValueError for impossible numbers.
        """
        for kept, offered in zip(accepted, drafted, strict=True):
            if not 0 <= kept <= offered <= max_draft_tokens:
                raise ValueError(f"accepted must be between 0 and the {offered} drafted tokens, got {kept}")
        return cls(
            num_drafts=sum(offered > 0 for offered in drafted),
            num_draft_tokens=sum(drafted),
            num_accepted_tokens=sum(accepted),
            accepted_per_position=[sum(kept > i for kept in accepted) for i in range(max_draft_tokens)],
            num_rounds=len(accepted),
        )

    def __add__(self, other: AcceptanceCounts) -> AcceptanceCounts:
        width = max(len(self.accepted_per_position), len(other.accepted_per_position))
        ours = self.accepted_per_position + [0] * (width - len(self.accepted_per_position))
        theirs = other.accepted_per_position + [0] * (width - len(other.accepted_per_position))
        return AcceptanceCounts(
            self.num_drafts + other.num_drafts,
            self.num_draft_tokens + other.num_draft_tokens,
            self.num_accepted_tokens + other.num_accepted_tokens,
            [a + b for a, b in zip(ours, theirs, strict=True)],
            self.num_rounds + other.num_rounds,
        )

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per verified draft, the target's own (bonus) token included: 1 without any draft."""
        return 1.0 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0

    @property
    def tokens_per_round(self) -> float:
        """Mean tokens per forward pass of the target after the prompt's.

        It is `acceptance_length` for a speculator, which drafts in every round, and below it for a drafter that
        sometimes has nothing to propose: only this compares the two fairly.
        """
        return 1.0 + self.num_accepted_tokens / self.num_rounds if self.num_rounds else 1.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted tokens over drafted tokens."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def acceptance_rate_per_position(self) -> list[float]:
        """For each draft position, the share of drafts accepted up to and including it; never increasing."""
        return [count / self.num_drafts for count in self.accepted_per_position] if self.num_drafts else []

    @property
    def drafts_per_accepted_length(self) -> list[int]:
        """How many drafts had exactly 0, 1, … k of their tokens accepted: `[k + 1]`, adding up to `num_drafts`."""
        at_least = [self.num_drafts, *self.accepted_per_position, 0]
        return [at_least[i] - at_least[i + 1] for i in range(len(at_least) - 1)]


def sum_counts(counts: Iterable[AcceptanceCounts]) -> AcceptanceCounts:
    return sum(counts, AcceptanceCounts())


@dataclass(frozen=True)
class TargetForwards:
    """Forward passes of the target, the prompt's included, summed over rows as if each were decoded alone."""

    plain: int = 0  # one per token
    used: int = 0

    @property
    def saved(self) -> int:
        return self.plain - self.used

    @property
    def share_saved(self) -> float:
        return self.saved / self.plain if self.plain else 0.0

    def __add__(self, more: TargetForwards) -> TargetForwards:
        return TargetForwards(self.plain + more.plain, self.used + more.used)


def predicted_speedup(
    acceptance_length: float, *, plain_step_cost: float, verify_cost: float, draft_cost: float
) -> float:
    """Tokens per second over those of plain decoding, after the prompt; costs are per step or round, in any one unit.

    A round yields `acceptance_length` tokens for `draft_cost + verify_cost`, a plain step one for `plain_step_cost`
    (Leviathan et al. 2023, arXiv:2211.17192, theorem 3.8, with the cost of a longer forward pass not taken as free).
    """
    return acceptance_length * plain_step_cost / (verify_cost + draft_cost)
