"""A table of what single values must be, and the check of a configuration against it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from verl_speculator.errors import ConfigError


class Rule(NamedTuple):
    """``right`` follows "must be" in the error."""

    right: str
    is_right: Callable[[Any], bool]
    keys: Sequence[str]


def check_rules(config: DictConfig, rules: Iterable[Rule]) -> None:
    """Raise :class:`ConfigError` for the first value that breaks a rule."""
    for rule in rules:
        for key in rule.keys:
            value = OmegaConf.select(config, key)
            if not rule.is_right(value):
                raise ConfigError(f"{key} must be {rule.right}, got {value!r}")


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_positive_int(value: Any) -> bool:
    return is_int(value) and value > 0


def is_int_from_0(value: Any) -> bool:
    return is_int(value) and value >= 0


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_number_from_0(value: Any) -> bool:
    return is_number(value) and value >= 0


def is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def one_of(*choices: Any) -> Callable[[Any], bool]:
    """Whether a value is one of ``choices``, of the same type: 1 is not true."""
    return lambda value: any(type(value) is type(choice) and value == choice for choice in choices)
