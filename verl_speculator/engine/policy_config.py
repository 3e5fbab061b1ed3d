"""verl's settings of FSDP with those of a speculator that follows the policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from verl.workers.config import FSDPEngineConfig

from verl_speculator.adapters.following import FollowingSpeculator


@dataclass
class PolicyEngineConfig(FSDPEngineConfig):
    """Named by `actor_rollout_ref.actor.fsdp_config._target_`."""

    speculator: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        FollowingSpeculator.of(self.speculator)
