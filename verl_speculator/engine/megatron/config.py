"""The typed engine section of the configuration for `engine=megatron`. Checked on verl 0.9.1; imports no Megatron."""

from __future__ import annotations

from dataclasses import dataclass

from verl.workers.config import McoreEngineConfig


@dataclass
class SpeculatorMcoreEngineConfig(McoreEngineConfig):
    """verl's Megatron configuration with `model_dtype`, which means what it means with FSDP.

    Attributes:
        model_dtype: The base's number type, `bf16` or `fp32`; verl's `dtype` follows from it.
    """

    _mutable_fields = McoreEngineConfig._mutable_fields | {"dtype"}

    model_dtype: str | None = None

    def __post_init__(self) -> None:
        # verl's own check knows 16-bit types only, while its engine builds float32 models as well.
        self.dtype = "bfloat16"
        super().__post_init__()
        if self.model_dtype == "fp32":
            self.dtype = "float32"
