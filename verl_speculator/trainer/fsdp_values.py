"""Values that cannot work with ``engine=fsdp``."""

from __future__ import annotations

from omegaconf import DictConfig

from verl_speculator.errors import ConfigError
from verl_speculator.trainer.rules import Rule, check_rules, is_positive_int

_RULES = (Rule("a positive integer", is_positive_int, ("engine.ulysses_sequence_parallel_size",)),)


def check_fsdp_values(config: DictConfig) -> None:
    """Raise :class:`ConfigError` for the first value that cannot work."""
    engine = config.engine
    if engine.strategy == "megatron":
        raise ConfigError("engine.strategy=megatron is not how to choose Megatron: give engine=megatron optim=megatron")
    if engine.strategy not in ("fsdp", "fsdp2"):
        raise ConfigError(f"engine.strategy must be fsdp2 or fsdp, got {engine.strategy!r}")
    check_rules(config, _RULES)
    if engine.ulysses_sequence_parallel_size > 1 and not config.model.use_remove_padding:
        raise ConfigError("engine.ulysses_sequence_parallel_size above 1 needs model.use_remove_padding=true")
    precision = engine.get("mixed_precision") or {}
    if precision.get("param_dtype") in ("fp16", "float16"):
        raise ConfigError("engine.mixed_precision.param_dtype must be bf16 or fp32: float16 is not supported")


def refuse_on_cpu(config: DictConfig) -> None:
    """Raise :class:`ConfigError` for a setting that needs an accelerator."""
    if config.engine.strategy == "fsdp":
        raise ConfigError("engine.strategy=fsdp cannot run on CPU: use engine.strategy=fsdp2")
    if config.engine.ulysses_sequence_parallel_size > 1:
        raise ConfigError("engine.ulysses_sequence_parallel_size must be 1 on CPU: it needs flash attention")
