"""What a scorer's decisions are worth, from the answer that came of them and what it took.

One sum covers all kinds of reward; a coefficient of 0 leaves a part out (`settings.RewardSettings`):

- sparse: `right_right` = `right_wrong` = 1, the others 0: the final answer alone;
- four cases: a coefficient for each of {answer right, wrong} × {strict decoding right, wrong};
- dense: `dense_weight`, drafts gained over strict decoding, negative where they did harm; `length_weight`, drafts kept;
- cost: minus λ times the target's calls over those of strict decoding; `controllers.CostPrice` moves λ.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from verl_speculator.scorer.settings import RewardSettings


@dataclass(frozen=True)
class Outcome:
    """What became of a window, or of a whole answer.

    Attributes:
        correct: Whether the answer is right.
        extracted: Whether there was an answer in the text; where not, it counts as wrong.
        strict_correct: Whether strict decoding's is right.
        accepted: Drafts that were kept.
        strict_accepted: Of a window, those that strict decoding keeps; of an answer, those that matched.
        drafted: Drafts that there were.
        calls: Calls of the target, in the unit of `strict_calls`.
        strict_calls: Those of strict decoding.
        mismatches: Mismatches that were decided on.
        accepted_mismatches: Those that were accepted.
    """

    correct: bool
    extracted: bool
    strict_correct: bool
    accepted: int
    strict_accepted: int
    drafted: int
    calls: float
    strict_calls: float
    mismatches: int
    accepted_mismatches: int

    @property
    def case(self) -> str:
        return f"{_word(self.correct)}_{_word(self.strict_correct)}"

    @property
    def is_harmed(self) -> bool:
        return self.strict_correct and not self.correct

    @property
    def cost(self) -> float:
        """Calls of the target over those of strict decoding."""
        return self.calls / max(self.strict_calls, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compute_spd_reward(
    outcome: Outcome, settings: RewardSettings, cost_price: float = 0.0, step_reward: float = 0.0
) -> tuple[float, dict[str, float]]:
    """The reward, and the parts that it is the sum of.

    Args:
        outcome: Of a window or a whole answer.
        settings: The coefficients.
        cost_price: λ now.
        step_reward: What the user's function gave.
    """
    gained = (outcome.accepted - outcome.strict_accepted) / max(outcome.drafted, 1)
    parts = {
        "answer": getattr(settings, outcome.case),
        "length": settings.length_weight * outcome.accepted / max(outcome.drafted, 1),
        "dense": settings.dense_weight * (-gained if outcome.is_harmed else gained),
        "cost": -cost_price * outcome.cost,
        "step": settings.step_weight * step_reward,
    }
    return sum(parts.values()), parts


def _word(is_right: bool) -> str:
    return "right" if is_right else "wrong"
