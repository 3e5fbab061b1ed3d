"""How the adapter named in a configuration is found."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from verl_speculator.adapters.chain_adapter import ChainSpeculatorAdapter
from verl_speculator.adapters.interface import SpeculatorAdapter
from verl_speculator.adapters.lstm_adapter import LSTMSpeculatorAdapter
from verl_speculator.adapters.mlp_adapter import MLPSpeculatorAdapter
from verl_speculator.adapters.model_adapter import ModelAdapter
from verl_speculator.errors import ConfigError
from verl_speculator.models import ChainSpeculator, Speculator, SpeculatorConfig
from verl_speculator.models.config import algorithm_names
from verl_speculator.models.importing import import_attribute, import_code
from verl_speculator.models.speculator import config_class_of

ADAPTER_KEY = "model.speculator_adapter"
# Names under which scripts for verl's own speculator trainer may know ours.
_OTHER_NAMES: Mapping[str, type[SpeculatorAdapter]] = {
    "verl.trainer.speculators.lstm_adapter.LSTMSpeculatorAdapter": LSTMSpeculatorAdapter,
    "verl.trainer.speculators.mlp_adapter.MLPSpeculatorAdapter": MLPSpeculatorAdapter,
}


def build_speculator_adapter(spec: Any, settings: Mapping[str, Any]) -> SpeculatorAdapter:
    """The adapter that `model.speculator_adapter` names, built with the settings of `model.speculator`.

    Args:
        spec: The name of a registered algorithm, a dotted name, `{"fqn": dotted name}`, or
            `{"path": file or module, "name": class}`. What is named may be a registered model's class instead of an
            adapter, and `name` the name under which that file or module registers one.

    Raises:
        ConfigError: The name does not import, is not an adapter, or the settings do not fit it.
    """
    return load_adapter_class(spec)(settings)


def load_adapter_class(spec: Any) -> type[SpeculatorAdapter]:
    """Find the class without building it; errors as in `build_speculator_adapter`."""
    if isinstance(spec, str) and "." not in spec:
        if spec not in algorithm_names():
            raise ConfigError(
                f"{ADAPTER_KEY} must be a full dotted name such as package.module.Class, or one of "
                f"{', '.join(algorithm_names())}; got {spec!r}"
            )
        name, found = spec, Speculator.get_class(spec)
    elif isinstance(spec, str):
        name, found = spec, _dotted(spec)
    elif isinstance(spec, Mapping) and set(spec) == {"fqn"}:
        name = str(spec["fqn"])
        found = _dotted(name)
    elif isinstance(spec, Mapping) and set(spec) == {"path", "name"}:
        name, path = str(spec["name"]), str(spec["path"])
        module = import_code(path, ADAPTER_KEY)
        if not hasattr(module, name) and name not in algorithm_names():
            raise ConfigError(f"{ADAPTER_KEY}: {path!r} has no class {name!r} and registers no speculator of that name")
        found = getattr(module, name) if hasattr(module, name) else Speculator.get_class(name)
    else:
        raise ConfigError(
            f"{ADAPTER_KEY} must be a dotted name, {{fqn: dotted.name}} or {{path: file.py, name: Class}}, got {spec!r}"
        )
    if isinstance(found, type) and issubclass(found, Speculator):
        return adapter_of(found)
    if not (isinstance(found, type) and issubclass(found, SpeculatorAdapter)):
        raise ConfigError(
            f"{ADAPTER_KEY}: {name!r} is no adapter; name a subclass of verl_speculator.adapters.SpeculatorAdapter"
        )
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ConfigError(f"{ADAPTER_KEY}: {name!r} is no complete adapter; it must define {missing}")
    return found


def _dotted(name: str) -> Any:
    return _OTHER_NAMES.get(name) or import_attribute(name, ADAPTER_KEY)


def adapter_for(config: SpeculatorConfig) -> type[SpeculatorAdapter]:
    """The adapter that trains on speculators with this configuration."""
    with torch.device("meta"):
        return adapter_of(type(Speculator.from_config(config)))


def adapter_of(model_class: type[Speculator]) -> type[SpeculatorAdapter]:
    """The adapter that drives a registered model."""
    for own in (LSTMSpeculatorAdapter, MLPSpeculatorAdapter):
        if own.speculator_class is model_class:
            return own
    config_class = config_class_of(model_class)
    parent = ChainSpeculatorAdapter if issubclass(model_class, ChainSpeculator) else ModelAdapter
    members = {"speculator_class": model_class, "config_class": config_class}
    return type(f"{model_class.__name__}Adapter", (parent,), members)
