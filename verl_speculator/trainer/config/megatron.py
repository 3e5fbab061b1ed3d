"""What `engine=megatron` needs of this machine and of the base model. Looks for packages without importing them.

The conditions on the base are those of Megatron-core 0.16.1 (`TransformerConfig.__post_init__`,
`VocabParallelEmbedding`, `ColumnParallelLinear`), which raises them on every process, and late.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from omegaconf import DictConfig

from verl_speculator.base_model.files import BaseSizes
from verl_speculator.errors import ConfigError

_INSTALL = "pip install 'verl_speculator[megatron]'"
_TENSOR_KEY = "engine.tensor_model_parallel_size"
_PIPELINE_KEY = "engine.pipeline_model_parallel_size"


def check_packages(engine: Any) -> None:
    """Raise `ConfigError` if a package that the run needs is missing here.

    Args:
        engine: the engine's section of the configuration, typed or not.
    """
    if not _is_installed("megatron.core"):
        raise ConfigError(f"engine=megatron needs megatron-core, which is not installed: {_INSTALL}")
    if engine.vanilla_mbridge is False and not has_megatron_bridge():
        raise ConfigError(
            "engine.vanilla_mbridge=false needs Megatron-Bridge, which is not installed: install it, or leave "
            f"engine.vanilla_mbridge null to use mbridge, which comes with {_INSTALL}"
        )
    if _reads_with_mbridge(engine) and not _is_installed("mbridge"):
        raise ConfigError(f"engine=megatron needs mbridge to read the base model, which is not installed: {_INSTALL}")
    size = engine.context_parallel_size
    if size > 1 and not _is_installed("transformer_engine"):
        raise ConfigError(
            f"engine.context_parallel_size={size} needs TransformerEngine, which is not installed: "
            "Megatron-core's own attention has no context parallelism"
        )


def has_megatron_bridge() -> bool:
    """Whether Megatron-Bridge is installed, which is preferred to mbridge where it can run."""
    return _is_installed("megatron.bridge")


def check_layout(engine: DictConfig, base: BaseSizes) -> None:
    """Raise `ConfigError` for a tensor or pipeline parallel size that the base model cannot be cut into."""
    size = engine.tensor_model_parallel_size
    must_divide = {"attention heads": base.num_attention_heads, "intermediate size": base.intermediate_size}
    if _reads_with_mbridge(engine):
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
    stages = engine.pipeline_model_parallel_size
    # The engine asks mbridge's class itself, which also knows of types that are not told from here.
    if stages > 1 and base.model_type == "llama" and base.tie_word_embeddings and _reads_with_mbridge(engine):
        raise ConfigError(
            f"{_PIPELINE_KEY}={stages}: mbridge cannot bring the tied embeddings of a llama model to two pipeline "
            f"stages: set it to 1 and raise {_TENSOR_KEY}, or give engine.vanilla_mbridge=false where Megatron-Bridge "
            "is there"
        )
    if base.num_layers is not None:
        _check_pipeline(engine, base.num_layers)


def _check_pipeline(engine: DictConfig, num_layers: int) -> None:
    stages = engine.pipeline_model_parallel_size
    settings = engine.override_transformer_config or {}
    # With a layout the user says himself how many layers each stage has.
    if stages == 1 or settings.get("pipeline_model_parallel_layout") is not None:
        return
    ends = [f"num_layers_in_{end}_pipeline_stage" for end in ("first", "last")]
    given = {key: settings[key] for key in ends if settings.get(key) is not None}
    if not given:
        # The embedding and the loss may each count as a layer.
        counted = num_layers + sum(
            bool(settings.get(f"account_for_{part}_in_pipeline_split")) for part in ("embedding", "loss")
        )
        if counted % stages:
            raise ConfigError(
                f"{_PIPELINE_KEY}={stages} must divide the base model's layers, {counted}, or give "
                + " and ".join(f"+engine.override_transformer_config.{key}" for key in ends)
            )
        return
    rest, middle = num_layers - sum(given.values()), stages - len(given)
    if bool(rest) != bool(middle) or (middle and (rest < 0 or rest % middle)):
        what = " and ".join(f"engine.override_transformer_config.{key}={layers}" for key, layers in given.items())
        raise ConfigError(
            f"{what} leave {rest} of the base model's {num_layers} layers for the other {middle} stages of "
            f"{_PIPELINE_KEY}={stages}, which must have equally many, at least one each"
        )


def _reads_with_mbridge(engine: Any) -> bool:
    choice = engine.vanilla_mbridge
    return not has_megatron_bridge() if choice is None else bool(choice)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        # The package around it is missing too.
        return False
