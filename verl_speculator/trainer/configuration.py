"""Composing the run's configuration: ours on top of verl's ``sft_trainer_engine``, then the command line.

Nothing of verl is imported, so that a mistyped key is answered at once.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_speculator.errors import ConfigError

CONFIG_NAME = "speculator_sft"

# A dotted width is a string; unquoted, YAML's rules make it a number and 1024.2050 loses a digit.
_WIDTH = re.compile(r"(\+{0,2}model\.speculator\.\w+_dim)=(\d+(?:\.\d+)+)")

# Nodes to which a user may add keys; what they may be is checked where they are read.
_OPEN_NODES = (
    "model.speculator",
    "model.override_config",
    "data.apply_chat_template_kwargs",
    "optim.override_optimizer_config",
    "engine",
    "hydra",
)
# Read by verl's dataset, although its configuration file does not list them.
_UNLISTED_KEYS = ("data.image_key", "data.video_key", "data.image_patch_size", "data.shuffle", "data.seed")


def config_dir() -> Path:
    """``configs/`` of the checkout, or its copy inside an installed package."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def load_config(overrides: Sequence[str], name: str = CONFIG_NAME) -> DictConfig:
    """The configuration with ``key=value`` overrides applied and unknown keys refused.

    :raises ConfigError: an override that does not parse, or a key that does not exist, with the nearest one that does
    """
    overrides = [_WIDTH.sub(r"\1='\2'", override) for override in overrides]
    try:
        with initialize_config_dir(str(config_dir()), version_base=None):
            search_path = f"hydra.searchpath=[file://{_verl_config_dir()}]"
            parsed = OverridesParser.create().parse_overrides(list(overrides))
            _check_keys(compose(name, [search_path]), parsed)
            config = compose(name, [*overrides, search_path])
            _resolve_base_path(config, parsed)
            OmegaConf.resolve(config.model)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_first_sentence(error)) from error
    return config


def missing_keys(config: DictConfig) -> list[str]:
    return sorted(OmegaConf.missing_keys(config))


def _verl_config_dir() -> Path:
    spec = importlib.util.find_spec("verl")
    if spec is None or spec.origin is None:
        raise ConfigError("verl is not installed: pip install 'verl>=0.9.1,<0.10'")
    return Path(spec.origin).parent / "trainer" / "config"


def _check_keys(defaults: DictConfig, overrides: Sequence[Override]) -> None:
    known = list(_flatten(defaults))
    for override in overrides:
        key = override.key_or_group
        top = key.split(".")[0].split("@")[0]
        if "." not in key and (override.package or top in ("engine", "optim", "model", "profiler", "hydra")):
            continue
        if key in known or any(key.startswith(node + ".") for node in _OPEN_NODES) and override.is_add():
            continue
        if key in _UNLISTED_KEYS or any(name.startswith(key + ".") for name in known):
            continue
        near = _nearest(key, known)
        raise ConfigError(f"{key} is not a configuration key" + (f"; did you mean {near}?" if near else ""))


def _nearest(key: str, known: Sequence[str]) -> str | None:
    """The likeliest key: in the same section if one is close there, else of any section by its last name."""
    section, _, name = key.rpartition(".")
    siblings = [other for other in known if other.rpartition(".")[0] == section]
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6) or difflib.get_close_matches(key, known, n=1)
    if near:
        return near[0]
    by_name = {other.rpartition(".")[2]: other for other in known}
    close = difflib.get_close_matches(name, list(by_name), n=1, cutoff=0.8)
    return by_name[close[0]] if close else None


def _flatten(node: Any, prefix: str = "") -> Iterator[str]:
    for key in node:
        name = f"{prefix}{key}"
        yield name
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
            yield from _flatten(child, f"{name}.")


def _resolve_base_path(config: DictConfig, overrides: Sequence[Override]) -> None:
    given = {override.key_or_group for override in overrides}
    if {"model.path", "model.partial_pretrain"} <= given and config.model.path != config.model.partial_pretrain:
        raise ConfigError("model.path and model.partial_pretrain are two names for one setting: give one of them")
    config.model.partial_pretrain = config.model.path


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
