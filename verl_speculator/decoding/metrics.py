"""The arithmetic of acceptance: counts are summed over rounds, rows and ranks, and divided once at the end."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class AcceptanceCounts:
    """What was drafted and what the target accepted, counted the way vLLM's `spec_decode_*` counters do.

    A draft is one verification round of one row. `accepted_per_position[i]` counts the drafts whose first `i + 1`
    tokens were all accepted (the joint event, not the conditional one).
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)

    @classmethod
    def from_drafts(cls, accepted: Iterable[int], num_draft_tokens: int) -> "AcceptanceCounts":
        """Counts of drafts of `num_draft_tokens` tokens each, of which `accepted` (one number per draft) were kept."""
        lengths = list(accepted)
        if any(not 0 <= length <= num_draft_tokens for length in lengths):
            raise ValueError(f"accepted must be between 0 and the {num_draft_tokens} drafted tokens, got {lengths}")
        return cls(
            num_drafts=len(lengths),
            num_draft_tokens=len(lengths) * num_draft_tokens,
            num_accepted_tokens=sum(lengths),
            accepted_per_position=[sum(length > i for length in lengths) for i in range(num_draft_tokens)],
        )

    def __add__(self, other: "AcceptanceCounts") -> "AcceptanceCounts":
        width = max(len(self.accepted_per_position), len(other.accepted_per_position))
        ours = self.accepted_per_position + [0] * (width - len(self.accepted_per_position))
        theirs = other.accepted_per_position + [0] * (width - len(other.accepted_per_position))
        return AcceptanceCounts(
            self.num_drafts + other.num_drafts,
            self.num_draft_tokens + other.num_draft_tokens,
            self.num_accepted_tokens + other.num_accepted_tokens,
            [a + b for a, b in zip(ours, theirs, strict=True)],
        )

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per verification round, the target's own (bonus) token included: 1 without any draft."""
        return 1.0 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted tokens over drafted tokens."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def acceptance_rate_per_position(self) -> list[float]:
        """For each draft position, the share of drafts accepted up to and including it; never increasing."""
        return [count / self.num_drafts for count in self.accepted_per_position] if self.num_drafts else []


def sum_counts(counts: Iterable[AcceptanceCounts]) -> AcceptanceCounts:
    return sum(counts, AcceptanceCounts())
