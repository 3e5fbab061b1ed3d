"""Turning `model.speculator` into a speculator's configuration, with errors that name the key a user typed."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, TypeVar, get_type_hints

from torch import nn

from verl_speculator.errors import ConfigError, nearest_name
from verl_speculator.models import ChainSpeculatorConfig, SpeculatorConfig

SECTION = "model.speculator"
ConfigT = TypeVar("ConfigT", bound=SpeculatorConfig)

# The run's configuration always has these, with these values unless a user set them (a test compares the file).
SHARED_DEFAULTS: Mapping[str, Any] = {
    "n_predict": 5,
    "inner_dim": 1024,
    "emb_dim": 1024,
    "proj_dim": 1024,
    "scale_input": False,
    "tie_weights": True,
    "tie_lstm_embs": False,
    "method": "sum_rnn",
    "objective": None,
    "objective_temperature": 1.0,
    "head_loss_weights": None,
    "draft_vocab_size": None,
    "draft_vocab_path": None,
    "init_from_base": "auto",
}
# Fields of a speculator's configuration that a user does not set: they come from the base model, or say what it is.
_BASE_FIELDS = (
    "speculators_model_type",
    "input_hidden_dim",
    "vocab_size",
    "base_model_name_or_path",
    "base_model_archs",
)


def config_settings(config_class: type[SpeculatorConfig]) -> list[str]:
    """The fields of a configuration that a user sets."""
    return [field.name for field in dataclasses.fields(config_class) if field.name not in _BASE_FIELDS]


class Setting(NamedTuple):
    """What a run may set of an algorithm, as its configuration class declares it."""

    name: str
    annotation: Any
    default: Any
    help: str


def declared_settings(config_class: type[SpeculatorConfig]) -> list[Setting]:
    """All that a run may set of an algorithm.

    A chain's are the fields of its configuration beside those of its `training_arguments`. Of another model they are
    the latter alone, for its configuration follows from these; or the former, where it has no such class.
    """
    is_chain = issubclass(config_class, ChainSpeculatorConfig)
    arguments: Any = config_class.training_arguments
    found = {}
    for owner in (config_class, arguments) if is_chain or arguments is None else (arguments,):
        if owner is None:
            continue
        annotations = get_type_hints(owner)
        for field in dataclasses.fields(owner):
            if field.init and field.name not in _BASE_FIELDS:
                # What the run's file sets comes before a chain's own default.
                default = (SHARED_DEFAULTS.get(field.name) if is_chain else None) or field.default
                help_text = str(field.metadata.get("help", ""))
                found[field.name] = Setting(field.name, annotations[field.name], default, help_text)
    return list(found.values())


def own_settings(known: Collection[str], settings: Mapping[str, Any], also: Collection[str] = ()) -> dict[str, Any]:
    """Those settings that are `known`.

    Args:
        also: Settings that mean something to the adapter and are not wanted.

    Raises:
        ConfigError: A key that it does not have, with the nearest that it has; unless that is a shared one which
            nobody has given a meaning: left at its default, or a width made equal to `inner_dim`.
    """
    accepted = {*known, *also, *SHARED_DEFAULTS}
    for key in settings:
        if key not in accepted:
            near = nearest_name(key, accepted, cutoff=0.5)
            hint = f"; did you mean {SECTION}.{near}?" if near else f"; it has {', '.join(sorted(accepted))}"
            raise ConfigError(f"{SECTION}.{key} is not a setting of this speculator{hint}")
    for key, default in SHARED_DEFAULTS.items():
        value = settings.get(key, default)
        follows_inner_dim = key.endswith("_dim") and "inner_dim" in known and value == settings.get("inner_dim")
        if key not in (*known, *also) and value != default and not follows_inner_dim:
            raise ConfigError(f"{SECTION}.{key} is not a setting of this speculator: leave it out")
    return {key: value for key, value in settings.items() if key in known}


def build_config(config_class: type[ConfigT], settings: Mapping[str, Any], **sizes: Any) -> ConfigT:
    """`config_class(**settings, **sizes)`, whose errors then name the full key."""
    try:
        return config_class(**settings, **sizes)
    except ConfigError as error:
        raise ConfigError(f"{SECTION}.{error}") from error


def base_model_sizes(model: nn.Module) -> dict[str, Any]:
    """What a speculator takes over from its base model: hidden size, vocabulary size and name."""
    config: Any = model.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return {
        "input_hidden_dim": text_config.hidden_size,
        "vocab_size": text_config.vocab_size,
        "base_model_name_or_path": getattr(config, "name_or_path", "") or "",
        "base_model_archs": list(getattr(config, "architectures", None) or []) or None,
    }
