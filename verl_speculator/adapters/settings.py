"""Turning ``model.speculator`` into a speculator's configuration, with errors that name the key a user typed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from verl_speculator.errors import ConfigError
from verl_speculator.models import SpeculatorConfig

SECTION = "model.speculator"
ConfigT = TypeVar("ConfigT", bound=SpeculatorConfig)


def check_keys(settings: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise :class:`ConfigError` with the nearest right name for the first key that is not known."""
    names = list(known)
    for key in settings:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(sorted(names))}"
            raise ConfigError(f"{SECTION}.{key} is not a setting of this speculator{hint}")


def build_config(config_class: type[ConfigT], settings: Mapping[str, Any], **sizes: Any) -> ConfigT:
    """``config_class(**settings, **sizes)``, whose errors then name the full key."""
    try:
        return config_class(**settings, **sizes)
    except ConfigError as error:
        raise ConfigError(f"{SECTION}.{error}") from error


def base_model_sizes(model: nn.Module) -> dict[str, Any]:
    """What a speculator takes over from its base model: hidden size, vocabulary size and name."""
    config = model.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return {
        "input_hidden_dim": text_config.hidden_size,
        "vocab_size": text_config.vocab_size,
        "base_model_name_or_path": getattr(config, "name_or_path", "") or "",
        "base_model_archs": list(getattr(config, "architectures", None) or []) or None,
    }


def check_base_sizes(speculator_config: SpeculatorConfig, hidden_size: int, vocab_size: int, path: str) -> None:
    """Raise :class:`ConfigError` if a speculator was trained for another hidden size or vocabulary than the base has."""
    for name, own, wanted in (
        ("hidden size", speculator_config.input_hidden_dim, hidden_size),
        ("vocabulary size", speculator_config.vocab_size, vocab_size),
    ):
        if own != wanted:
            raise ConfigError(
                f"model.speculator_path: the speculator in {path!r} was trained for {name} {own}, "
                f"and the base model has {wanted}"
            )
