"""How an engine divides the processes of a run among themselves."""

from __future__ import annotations

from omegaconf import DictConfig

# The sizes whose product is the number of processes that work on the same rows.
_FSDP_SIZES = ("ulysses_sequence_parallel_size",)
MEGATRON_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


def engine_name(config: DictConfig) -> str:
    """``fsdp`` or ``megatron``: the group with which the configuration was composed."""
    return "megatron" if MEGATRON_SIZES[0] in config.engine else "fsdp"


def model_parallel_sizes(config: DictConfig) -> dict[str, int]:
    """Each size under its full key."""
    names = MEGATRON_SIZES if engine_name(config) == "megatron" else _FSDP_SIZES
    return {f"engine.{name}": config.engine[name] for name in names}


def data_parallel_size(config: DictConfig, world_size: int) -> int:
    """The number of parts into which a batch is cut, where ``world_size`` has been checked to fit."""
    for size in model_parallel_sizes(config).values():
        world_size //= size
    return world_size
