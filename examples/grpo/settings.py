"""What the experiment does in its budgets. Every number that decides a stage's result is here, and keys its marker."""

from __future__ import annotations

from dataclasses import dataclass, field

from examples.grpo.reward import LAST_WORD, STYLE
from examples.grpo.world import WorldSettings


@dataclass(frozen=True)
class SpeculatorSettings:
    n_predict: int = 3
    width: int = 64
    num_epochs: int = 6
    batch_size: int = 32
    learning_rate: float = 5e-3


@dataclass(frozen=True)
class GrpoSettings:
    num_steps: int = 60
    batch_size: int = 16
    num_samples: int = 8
    learning_rate: float = 1e-3
    kl_coefficient: float = 0.001
    speculator_learning_rate: float = 2e-3


@dataclass(frozen=True)
class RunSettings:
    """A run of GRPO: its reward, and what is set of the speculator beside the rest."""

    reward: str = STYLE
    speculator: tuple[str, ...] = ()


FOLLOWING = "following"
RUNS = {
    FOLLOWING: RunSettings(),
    # Its own rollouts are drafted by a speculator that stays as it is, so vLLM's counters are those of a frozen draft.
    "frozen": RunSettings(speculator=("lr=1e-12",)),
    "replay": RunSettings(speculator=("extra_steps=2", "replay_steps=4")),
    "adaptive": RunSettings(speculator=("adaptive=true",)),
    "weak": RunSettings(reward=LAST_WORD),
    "weak-adaptive": RunSettings(reward=LAST_WORD, speculator=("adaptive=true",)),
}


@dataclass(frozen=True)
class Budget:
    world: WorldSettings = field(default_factory=WorldSettings)
    speculator: SpeculatorSettings = field(default_factory=SpeculatorSettings)
    grpo: GrpoSettings = field(default_factory=GrpoSettings)
    runs: tuple[str, ...] = (FOLLOWING,)


BUDGETS = {
    "demo": Budget(),
    "full": Budget(runs=tuple(RUNS)),
    # The machinery alone: the policy has learnt next to nothing.
    "small": Budget(
        world=WorldSettings(hidden_size=32, num_layers=1, num_steps=10, num_chats=32, num_prompts=8),
        speculator=SpeculatorSettings(width=16, num_epochs=1, batch_size=8),
        grpo=GrpoSettings(num_steps=4, batch_size=2, num_samples=2),
    ),
}
