"""What a training adjusts beside the weights: the price of a target call, the threshold, by what scores are normalised.

Checkpoints hold all of it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, pvariance

from verl_speculator.errors import CheckpointError
from verl_speculator.scorer.settings import RewardSettings, RolloutSettings

STATE_FILE = "scorer_state.json"


@dataclass
class Controllers:
    """A few numbers and the rules that move them.

    With a fixed price of a call, rejecting every mismatch can be the best policy, and so can accepting all. The price λ
    is therefore the multiplier of the bound "lose at most `accuracy_loss` against strict decoding", by dual ascent: λ
    rises while the bound is kept and falls while it is not. Right and strictly right are compared on the same answers.

    Attributes:
        cost_price: λ.
        threshold: A mismatch is accepted from this score on.
        score_mean: Of the log odds of accepting a mismatch, and
        score_variance: theirs: running statistics over the steps, where they are wanted.
    """

    cost_price: float
    threshold: float
    score_mean: float = 0.0
    score_variance: float = 1.0
    has_statistics: bool = False

    @classmethod
    def start(cls, reward: RewardSettings, rollout: RolloutSettings) -> Controllers:
        return cls(reward.cost, rollout.score_threshold)

    def update_price(self, reward: RewardSettings, accuracy: float, strict_accuracy: float) -> None:
        slack = accuracy - strict_accuracy + reward.accuracy_loss
        self.cost_price = min(max(self.cost_price + reward.cost_step * slack, 0.0), reward.cost_max)

    def update_threshold(self, rollout: RolloutSettings, scores: list[float]) -> None:
        """Move an adaptive threshold by the share of these mismatches' scores that reach it."""
        if rollout.threshold.mode != "adaptive" or not scores:
            return
        rate = sum(score >= self.threshold for score in scores) / len(scores)
        moved = self.threshold + rollout.threshold.step_size * (rate - rollout.threshold.acceptance_rate)
        self.threshold = min(max(moved, 0.0), 1.0)

    def update_statistics(self, rollout: RolloutSettings, log_odds: list[float]) -> None:
        """Let these mismatches' log odds count with `score_momentum`; the first are all there is."""
        if not rollout.score_momentum or not log_odds:
            return
        share = rollout.score_momentum if self.has_statistics else 1.0
        mean = fmean(log_odds)
        shift = mean - self.score_mean
        # The variance of a mixture: that within the parts and that between them.
        self.score_variance = (
            (1 - share) * self.score_variance + share * pvariance(log_odds, mean) + share * (1 - share) * shift**2
        )
        self.score_mean += share * shift
        self.has_statistics = True

    @property
    def score_scale(self) -> float:
        # Where all scores are the same there is nothing to bring to a common size.
        return max(math.sqrt(self.score_variance), 1e-3) if self.has_statistics else 1.0

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STATE_FILE).write_text(json.dumps(asdict(self)) + "\n")

    def load(self, folder: Path) -> None:
        """Raises CheckpointError if the file of `save` is missing or damaged."""
        path = folder / STATE_FILE
        try:
            saved = json.loads(path.read_text())
            self.cost_price, self.threshold = float(saved["cost_price"]), float(saved["threshold"])
            # A version without statistics had none to write.
            self.score_mean, self.score_variance = saved.get("score_mean", 0.0), saved.get("score_variance", 1.0)
            self.has_statistics = saved.get("has_statistics", False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read, it is missing or damaged: {error}") from error


def learned_threshold(start_bias: float, bias: float) -> float:
    """The threshold that a head's log odds of accepting have learned as their bias.

    `z + bias > 0` is `z + start_bias > start_bias - bias`: with the bias where it was, the rest of it is a threshold.
    """
    return 1 / (1 + math.exp(bias - start_bias))
