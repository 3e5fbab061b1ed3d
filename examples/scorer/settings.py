"""What the experiment does in its budgets. Every number that decides a stage's result is here, and keys its marker."""

from __future__ import annotations

from dataclasses import dataclass, field

from examples.scorer.world import ModelSettings, WorldSettings


@dataclass(frozen=True)
class DecodingSettings:
    num_drafts: int = 5
    max_new_tokens: int = 48
    batch_size: int = 500


@dataclass(frozen=True)
class HeadSettings:
    num_epochs: int = 30
    inner_dim: int = 128
    harm_weight: float = 3.0


@dataclass(frozen=True)
class GrpoSettings:
    """GRPO from the supervised head, on windows or on whole answers; 0 steps leave it out."""

    steps: int
    batch_size: int
    num_samples: int = 8
    learning_rate: float = 1e-3
    # The head from labels is sure of nearly everything: drawn at 1, all samples of a group would be the same.
    temperature: float = 2.5
    cost: float = 0.3
    cost_step: float = 0.5


@dataclass(frozen=True)
class EvaluationSettings:
    """The bound is one point of accuracy, at 95 % one-sided, on the questions of the test set."""

    accuracy_bound: float = 0.01
    num_oracle: int = 200
    rules: tuple[str, ...] = ("accept-all", "random", "probability", "top-k", "kl", "margin", "entropy")


@dataclass(frozen=True)
class GateSettings:
    """What the world must be like, or nothing could be learned from the experiment."""

    most_auc: float = 0.9
    least_oracle_gain: float = 0.3
    least_accuracy: float = 0.8
    most_accuracy: float = 0.97


@dataclass(frozen=True)
class Budget:
    world: WorldSettings = field(default_factory=WorldSettings)
    decoding: DecodingSettings = field(default_factory=DecodingSettings)
    head: HeadSettings = field(default_factory=HeadSettings)
    windows: GrpoSettings = GrpoSettings(steps=100, batch_size=64)
    answers: GrpoSettings = GrpoSettings(steps=100, batch_size=32, temperature=1.5, cost=0.5, cost_step=0.05)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    gates: GateSettings = field(default_factory=GateSettings)


BUDGETS = {
    "full": Budget(),
    "demo": Budget(
        world=WorldSettings(
            target=ModelSettings(64, 3, 1500, batch_size=48, stop_at=0.97),
            draft=ModelSettings(64, 2, 1200, batch_size=48, stop_at=0.75),
            num_train=2000,
            num_validation=1000,
            num_test=2000,
        ),
        head=HeadSettings(num_epochs=20),
        windows=GrpoSettings(steps=30, batch_size=48),
        answers=GrpoSettings(steps=50, batch_size=24, temperature=1.5, cost=0.5, cost_step=0.05),
    ),
    # The machinery alone: its models are wrong about everything.
    "small": Budget(
        world=WorldSettings(
            target=ModelSettings(32, 1, 6, batch_size=8),
            draft=ModelSettings(16, 1, 4, batch_size=8),
            num_train=16,
            num_validation=8,
            num_test=8,
        ),
        head=HeadSettings(num_epochs=2, inner_dim=8),
        windows=GrpoSettings(steps=1, batch_size=4, num_samples=2),
        answers=GrpoSettings(steps=1, batch_size=2, num_samples=2),
        decoding=DecodingSettings(max_new_tokens=16, batch_size=24),
        evaluation=EvaluationSettings(accuracy_bound=0.5, num_oracle=4, rules=("accept-all", "probability")),
        gates=GateSettings(most_auc=2, least_oracle_gain=-1, least_accuracy=0, most_accuracy=1),
    ),
}
