"""Whether Megatron-core can cut a base model into the parts that were asked for.

The conditions are those of Megatron-core 0.16.1 (``TransformerConfig.__post_init__``, ``VocabParallelEmbedding``,
``ColumnParallelLinear``), which raises them on every process after the process groups are built.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from verl_speculator.base_model.files import BaseSizes
from verl_speculator.errors import ConfigError
from verl_speculator.trainer.megatron_packages import has_megatron_bridge

_TENSOR_KEY = "engine.tensor_model_parallel_size"
_PIPELINE_KEY = "engine.pipeline_model_parallel_size"
# Settings of Megatron-core that say themselves how many layers each stage has.
_OWN_SPLIT = ("pipeline_model_parallel_layout",)


def check_layout(engine: DictConfig, base: BaseSizes) -> None:
    """Raise :class:`ConfigError` for a tensor or pipeline parallel size that the base model cannot be cut into."""
    _check_tensor_parallel(engine, base)
    if base.num_layers is not None:
        _check_pipeline(engine, base.num_layers)


def _check_tensor_parallel(engine: DictConfig, base: BaseSizes) -> None:
    size = engine.tensor_model_parallel_size
    must_divide = {"attention heads": base.num_attention_heads, "intermediate size": base.intermediate_size}
    if engine.vanilla_mbridge or (engine.vanilla_mbridge is None and not has_megatron_bridge()):
        # Megatron-Bridge pads the vocabulary; verl does not ask mbridge to.
        must_divide["vocabulary size"] = base.vocab_size
    for name, number in must_divide.items():
        if number is not None and number % size:
            raise ConfigError(f"{_TENSOR_KEY}={size} must divide the base model's {name}, {number}")
    groups = base.num_key_value_heads
    if groups is not None and groups % size and size % groups:
        raise ConfigError(
            f"{_TENSOR_KEY}={size} must be a divisor or a multiple of the base model's key-value heads, {groups}"
        )


def _check_pipeline(engine: DictConfig, num_layers: int) -> None:
    stages = engine.pipeline_model_parallel_size
    settings = engine.override_transformer_config or {}
    if stages == 1 or any(settings.get(key) is not None for key in _OWN_SPLIT):
        return
    ends = {
        f"engine.override_transformer_config.num_layers_in_{end}_pipeline_stage": _layers_at(end, settings)
        for end in ("first", "last")
    }
    given = {key: layers for key, layers in ends.items() if layers is not None}
    if not given:
        # The embedding and the loss may each count as a layer.
        counted = num_layers + sum(
            bool(settings.get(f"account_for_{part}_in_pipeline_split")) for part in ("embedding", "loss")
        )
        if counted % stages:
            raise ConfigError(
                f"{_PIPELINE_KEY}={stages} must divide the base model's layers, {counted}, or give "
                + " and ".join(f"+{key}" for key in ends)
            )
        return
    rest, middle = num_layers - sum(given.values()), stages - len(given)
    if bool(rest) != bool(middle) or (middle and (rest < 0 or rest % middle)):
        what = " and ".join(f"{key}={layers}" for key, layers in given.items())
        raise ConfigError(
            f"{what} leave {rest} of the base model's {num_layers} layers for the other {middle} stages of "
            f"{_PIPELINE_KEY}={stages}, which must have equally many, at least one each"
        )


def _layers_at(end: str, settings: Any) -> int | None:
    key = f"num_layers_in_{end}_pipeline_stage"
    layers = settings.get(key)
    if layers is None:
        return None
    if not isinstance(layers, int) or layers < 1:
        raise ConfigError(f"engine.override_transformer_config.{key} must be a positive integer, got {layers!r}")
    return layers
