"""The typed model section of the configuration, which verl hands to the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from verl.workers.config import HFModelConfig

MODEL_TYPE = "language_model_with_speculator"


@dataclass
class SpeculatorModelConfig(HFModelConfig):
    """verl's model configuration with the keys of a speculator; see `configs/speculator_sft.yaml` for each."""

    speculator: dict[str, Any] = field(default_factory=dict)
    speculator_type: str | None = None
    speculator_adapter: Any = None
    speculator_path: str | None = None
    speculator_dtype: str | None = None
    save_pytorch_model_bin: bool = True
    speculator_loss_coeff: float = 1.0
    speculator_shard_size: int | None = None
    gather_speculator_once: bool = True
    compile: bool = False
    attend_by_sequence: bool = True
    freeze_base_model: bool = True
    detach_hidden_states: bool = False
    measure_sampled_acceptance: bool = True
    partial_pretrain: str | None = None
