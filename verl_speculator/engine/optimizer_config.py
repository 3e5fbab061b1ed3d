"""The typed optimizer section of the configuration, for both engines. Checked on verl 0.9.1; imports no Megatron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.workers.config import FSDPOptimizerConfig, McoreOptimizerConfig

from verl_speculator.platforms import cpu

# A trained base moves little where a new speculator has far to go.
_BASE_SHARE = 0.1


@dataclass
class SpeculatorFSDPOptimizerConfig(FSDPOptimizerConfig):
    """verl's optimizer of FSDP with a learning rate for the base.

    Attributes:
        base_lr: The base's in joint training, under the same schedule; None for a tenth of `lr`.
    """

    base_lr: float | None = None


@dataclass
class SpeculatorMcoreOptimizerConfig(McoreOptimizerConfig):
    """verl's optimizer of Megatron with a learning rate for the base.

    Attributes:
        base_lr: The base's in joint training, under the same schedule; None for a tenth of `lr`.
    """

    base_lr: float | None = None


def base_lr(config: SpeculatorFSDPOptimizerConfig | SpeculatorMcoreOptimizerConfig) -> float:
    return _BASE_SHARE * config.lr if config.base_lr is None else config.base_lr


def adam_arguments() -> dict[str, Any]:
    """Beyond what the configuration says: on CPU torch's own choice is a loop over tensors, ten times slower."""
    return {"fused": True} if cpu.is_active() else {}
