"""Whether what ``engine=megatron`` needs is installed. Looks for packages without importing them."""

from __future__ import annotations

import importlib.util
from typing import Any

from verl_speculator.errors import ConfigError

_INSTALL = "pip install 'verl_speculator[megatron]'"


def check_packages(engine: Any) -> None:
    """Raise :class:`ConfigError` if a package that the run needs is missing here.

    :param engine: the engine's section of the configuration, typed or not
    """
    if not is_installed("megatron.core"):
        raise ConfigError(f"engine=megatron needs megatron-core, which is not installed: {_INSTALL}")
    choice = engine.vanilla_mbridge
    if choice is False and not has_megatron_bridge():
        raise ConfigError(
            "engine.vanilla_mbridge=false needs Megatron-Bridge, which is not installed: install it, or leave "
            f"engine.vanilla_mbridge null to use mbridge, which comes with {_INSTALL}"
        )
    if choice is not False and not is_installed("mbridge") and (choice or not has_megatron_bridge()):
        raise ConfigError(f"engine=megatron needs mbridge to read the base model, which is not installed: {_INSTALL}")
    size = engine.context_parallel_size
    if size > 1 and not is_installed("transformer_engine"):
        raise ConfigError(
            f"engine.context_parallel_size={size} needs TransformerEngine, which is not installed: "
            "Megatron-core's own attention has no context parallelism"
        )


def has_megatron_bridge() -> bool:
    return is_installed("megatron.bridge")


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        # The package around it is missing too.
        return False
