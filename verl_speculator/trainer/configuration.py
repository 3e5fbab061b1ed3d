"""Composing the run's configuration: ours on top of verl's ``sft_trainer_engine``, then the command line.

Nothing of verl is imported, so that a mistyped key is answered at once.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
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

# verl's configuration groups, and what this package can train with.
_GROUPS = {"model": ("hf_model",), "engine": ("fsdp",), "optim": ("fsdp",), "profiler": ("profiler",)}

# Sections to which a user may add keys; what these may be is checked where they are read.
_OPEN_SECTIONS = (
    "model.speculator",
    "model.override_config",
    "data.apply_chat_template_kwargs",
    "optim.override_optimizer_config",
    "engine.mixed_precision",
)
# Read by verl, although its configuration files do not list them.
_UNLISTED_KEYS = (
    "data.image_key",
    "data.video_key",
    "data.image_patch_size",
    "data.shuffle",
    "data.seed",
    "engine.mixed_precision",
)
# What other trainers call the same thing, where no likeness of the letters would tell.
_OTHER_NAMES = {
    "base_model": "model.partial_pretrain",
    "batch_size": "data.train_batch_size",
    "epochs": "trainer.total_epochs",
    "learning_rate": "optim.lr",
    "num_train_epochs": "trainer.total_epochs",
    "output_dir": "trainer.default_local_dir",
    "save_path": "trainer.default_local_dir",
}
# Neither verl nor Hugging Face reads a path that begins with ~.
_PATH_KEYS = (
    "model.path",
    "model.tokenizer_path",
    "model.hf_config_path",
    "model.speculator_path",
    "model.speculator_adapter.path",
    "data.train_files",
    "data.val_files",
    "trainer.default_local_dir",
    "trainer.resume_from_path",
)


def config_dir() -> Path:
    """``configs/`` of the checkout, or its copy inside an installed package."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def load_config(overrides: Sequence[str]) -> DictConfig:
    """The configuration with ``key=value`` overrides applied, interpolations resolved and unknown keys refused.

    :raises ConfigError: an override that does not parse, or a key that does not exist, with the nearest one that does
    """
    parsed = [_parse(override) for override in overrides]
    search_path = f"hydra.searchpath=['file://{_escape(str(_verl_config_dir()))}']"
    try:
        with initialize_config_dir(str(config_dir()), version_base=None):
            _check_overrides(parsed, compose(CONFIG_NAME, [search_path]))
            config = compose(CONFIG_NAME, [search_path, *(str(override.input_line) for override in parsed)])
        _name_base_model(config, {override.key_or_group for override in parsed})
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_sentence(error)) from error
    _complete_paths(config)
    return config


def _verl_config_dir() -> Path:
    spec = importlib.util.find_spec("verl")
    if spec is None or spec.origin is None:
        raise ConfigError("verl is not installed: pip install 'verl>=0.9.1,<0.10'")
    return Path(spec.origin).parent / "trainer" / "config"


def _parse(text: str) -> Override:
    """Read an override; a value that is no Hydra expression (``~/data``, ``/a=b.parquet``) is taken as it is typed."""
    parser = OverridesParser.create()
    text = re.sub(f"^{_WIDTH.pattern}$", r"\1='\2'", text)
    key, equals, value = text.partition("=")
    try:
        override = parser.parse_override(text)
    except HydraException as error:
        if not equals or value[:1] in ("{", "[", "'", '"'):
            raise ConfigError(f"{text!r} is not a setting in the form key=value ({_one_sentence(error)})") from error
        try:
            override = parser.parse_override(f"{key}='{_escape(value)}'")
        except HydraException:
            raise ConfigError(f"{text!r} is not a setting in the form key=value") from error
    if override.is_sweep_override():
        raise ConfigError(
            f"{text!r} asks for several values and a run has one: write a list as [a,b], quote a text with a comma"
        )
    return override


def _escape(text: str) -> str:
    """``text`` for between single quotes in Hydra's grammar."""
    return text.replace("\\", "\\\\").replace("'", "\\'") if text.endswith("\\") else text.replace("'", "\\'")


def _check_overrides(overrides: Sequence[Override], defaults: DictConfig) -> None:
    known = dict(_flatten(defaults))
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if override.is_delete():
            raise ConfigError(f"{key} cannot be removed from the configuration: leave out {override.input_line!r}")
        if key in _GROUPS and not isinstance(value, dict):
            _check_group(override)
        elif known.get(key) and not isinstance(value, dict):
            raise ConfigError(f"{key} is a section: set its keys, as in {key}.{_first_key(key, known)}=...")
        else:
            _check_key(key, override, known)
            if isinstance(value, dict) and known.get(key):
                for name in _nested_names(value):
                    _check_key(f"{key}.{name}", override, known)


def _check_group(override: Override) -> None:
    group, choices = override.key_or_group, _GROUPS[override.key_or_group]
    if override.is_add() or override.package is not None or override.value() not in choices:
        raise ConfigError(f"{group} can only be {' or '.join(choices)}, as in {group}={choices[0]}")


def _check_key(key: str, override: Override, known: Mapping[str, bool]) -> None:
    adds = override.is_add() or override.is_force_add()
    if key in known:
        if override.is_add() and not known[key]:
            raise ConfigError(f"{key} is there already: write {key}=... without the plus sign")
        return
    section = next((section for section in _OPEN_SECTIONS if key.startswith(f"{section}.")), None)
    if key in _UNLISTED_KEYS or section is not None:
        if adds:
            return
        near = _nearest(key, known) if section is not None else None
        hint = f"did you mean {near}? A further key" if near else "it"
        raise ConfigError(f"{key} is not a key with a default; {hint} is added with a plus sign: +{key}=...")
    near = _nearest(key, known)
    raise ConfigError(f"{key} is not a configuration key; " + (f"did you mean {near}?" if near else _alternatives(key, known)))


def _nearest(key: str, known: Mapping[str, bool]) -> str | None:
    """The likeliest key: one of the same section if close, else of any section by its whole or its last name."""
    section, _, name = key.rpartition(".")
    siblings = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == section}
    near = difflib.get_close_matches(name, list(siblings), n=1, cutoff=0.6)
    if near:
        return siblings[near[0]]
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    if section not in known:
        near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
        if near:
            return near[0]
    by_name = {other.rpartition(".")[2]: other for other in reversed(list(known)) if not known[other]}
    close = difflib.get_close_matches(name, list(by_name), n=1, cutoff=0.8)
    return by_name[close[0]] if close else None


def _alternatives(key: str, known: Mapping[str, bool]) -> str:
    section = key.rpartition(".")[0]
    names = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == section]
    return f"{section} has {', '.join(names)}" if section and names else f"the sections are {', '.join(_top(known))}"


def _top(known: Mapping[str, bool]) -> list[str]:
    return sorted(key for key in known if "." not in key)


def _first_key(section: str, known: Mapping[str, bool]) -> str:
    return next((key.removeprefix(f"{section}.") for key in known if key.startswith(f"{section}.")), "KEY")


def _flatten(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every key's full name, and whether it is a section."""
    for key in node:
        child = node._get_node(key)
        is_section = isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation()
        yield f"{prefix}{key}", is_section
        if is_section:
            yield from _flatten(child, f"{prefix}{key}.")


def _nested_names(values: Mapping[Any, Any]) -> Iterator[str]:
    for key, value in values.items():
        yield str(key)
        if isinstance(value, Mapping):
            yield from (f"{key}.{name}" for name in _nested_names(value))


def _name_base_model(config: DictConfig, given: set[str]) -> None:
    """Make ``model.path`` and ``model.partial_pretrain`` the same, whichever was given."""
    model = config.model
    if {"model.path", "model.partial_pretrain"} <= given and model.path != model.partial_pretrain:
        raise ConfigError("model.path and model.partial_pretrain are two names for one setting: give one of them")
    model.partial_pretrain = model.path


def _complete_paths(config: DictConfig) -> None:
    for key in _PATH_KEYS:
        value = None if OmegaConf.is_missing(config, key) else OmegaConf.select(config, key, throw_on_missing=False)
        if isinstance(value, str):
            OmegaConf.update(config, key, os.path.expanduser(value))
        elif OmegaConf.is_list(value):
            OmegaConf.update(config, key, [os.path.expanduser(v) if isinstance(v, str) else v for v in value])
    config.model.partial_pretrain = config.model.path


def _one_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = getattr(error, "full_key", None)
    return (f"{key}: " if key else "") + (lines[0] if lines else type(error).__name__)
