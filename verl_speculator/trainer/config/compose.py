"""Composing the run's configuration: ours on top of verl's `sft_trainer_engine`, then the command line.

An override that cannot be right is answered with the nearest one that is. Nothing of verl or torch is imported, so
that the answer comes at once.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_speculator.errors import ConfigError, nearest_name

CONFIG_NAME = "speculator_sft"
ENGINES = ("fsdp", "megatron")

# Every key's full name, and whether it is a section.
KnownKeys: TypeAlias = Mapping[str, bool]

# verl's configuration groups, and what this package can train with.
_GROUPS = {"model": ("hf_model",), "engine": ENGINES, "optim": ENGINES, "profiler": ("profiler",)}

# Sections to which a user may add keys; what these may be is checked where they are read.
_OPEN_SECTIONS = (
    "model.speculator",
    "model.override_config",
    "data.apply_chat_template_kwargs",
    "optim.override_optimizer_config",
    "engine.mixed_precision",
    "engine.override_ddp_config",
    "engine.override_mcore_model_config",
    "engine.override_transformer_config",
)
# Read by verl, although its configuration files do not list them; the last one with FSDP only.
UNLISTED_KEYS = (
    "data.image_key",
    "data.video_key",
    "data.image_patch_size",
    "data.shuffle",
    "data.seed",
    "engine.mixed_precision",
)
# What serves the same purpose with FSDP and with Megatron.
_COUNTERPARTS = (
    ("engine.ulysses_sequence_parallel_size", "engine.context_parallel_size"),
    ("engine.mixed_precision", "engine.model_dtype"),
    ("optim.lr_scheduler_type", "optim.lr_decay_style"),
    ("optim.min_lr_ratio", "optim.min_lr"),
)
# What other trainers call the same thing, where no likeness of the letters would tell.
_OTHER_NAMES = {
    "base_model": "model.partial_pretrain",
    "batch_size": "data.train_batch_size",
    "cp": "engine.context_parallel_size",
    "epochs": "trainer.total_epochs",
    "learning_rate": "optim.lr",
    "output_dir": "trainer.default_local_dir",
    "pp": "engine.pipeline_model_parallel_size",
    "save_path": "trainer.default_local_dir",
    "tp": "engine.tensor_model_parallel_size",
}

_INPUT_PATHS = (
    "model.path",
    "model.tokenizer_path",
    "model.hf_config_path",
    "model.speculator_path",
    "model.speculator_adapter.path",
    "data.train_files",
    "data.val_files",
    "trainer.resume_from_path",
)

# A dotted width is a string; unquoted, YAML's rules make it a number and 1024.2050 loses a digit.
_WIDTH = re.compile(r"(\+{0,2}model\.speculator\.\w+_dim)=(\d+(?:\.\d+)+)")


def config_dir() -> Path:
    """`configs/` of the checkout, or its copy inside an installed package."""
    package = Path(__file__).resolve().parents[2]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def load_config(overrides: Sequence[str]) -> DictConfig:
    """The configuration with `key=value` overrides applied, and interpolations and local paths resolved.

    Raises:
        ConfigError: an override that does not parse, or a key that does not exist, with the nearest one that does.
    """
    parsed = [parse_override(text) for text in overrides]
    # As a folder: Hydra's pkg:// form would import verl, which takes ten seconds.
    search_path = "hydra.searchpath=[" + quoted(f"file://{verl_config_dir()}") + "]"
    try:
        # Which keys there are depends on the engine, and Hydra's own answer to an unknown one names no other.
        engine = chosen_engine(parsed)
        with initialize_config_dir(str(config_dir()), version_base=None):
            check_overrides(parsed, engine, functools.partial(_known_keys_of, search_path))
            config = compose(CONFIG_NAME, [search_path, *(str(override.input_line) for override in parsed)])
        given = {override.key_or_group for override in parsed}
        if {"model.path", "model.partial_pretrain"} <= given and config.model.path != config.model.partial_pretrain:
            raise ConfigError("model.path and model.partial_pretrain are two names for one setting: give one of them")
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(first_line(error)) from error
    _resolve_paths(config)
    # Whichever of the two a user gave, what is printed or saved says the same under both.
    config.model.partial_pretrain = config.model.path
    return config


def engine_name(config: DictConfig) -> str:
    """`fsdp` or `megatron`: the group with which the configuration was composed."""
    return "megatron" if "tensor_model_parallel_size" in config.engine else "fsdp"


def parse_override(text: str) -> Override:
    """One `key=value`. A value that is no Hydra expression, such as `~/data` or `/a=b.parquet`, is taken as typed.

    Raises:
        ConfigError: it cannot be read, or gives several values.
    """
    width = _WIDTH.fullmatch(text)
    key, equals, value = text.partition("=")
    try:
        override = OverridesParser.create().parse_override(f"{width[1]}={quoted(width[2])}" if width else text)
    except HydraException as error:
        problem = f"{text!r} is not a setting in the form key=value ({first_line(error)})"
        if not equals or value[:1] in ("{", "[", "'", '"'):
            raise ConfigError(problem) from error
        try:
            # Most such values are paths. What begins like a list, a dictionary or a quoted text was meant as one.
            override = OverridesParser.create().parse_override(f"{key}={quoted(value)}")
        except HydraException:
            raise ConfigError(problem) from error
    if override.is_sweep_override():
        raise ConfigError(
            f"{text!r} asks for several values, and a run has one: write a list as [a,b] and quote a text with commas"
        )
    return override


def chosen_engine(overrides: Sequence[Override]) -> str:
    """The engine that the groups `engine` and `optim` name.

    Raises:
        ConfigError: a group that cannot train a speculator, or two that do not go together.
    """
    chosen = {"engine": ENGINES[0], "optim": ENGINES[0]}
    for override in overrides:
        if override.key_or_group in chosen and not override.is_delete() and not isinstance(override.value(), dict):
            _check_group(override)
            chosen[override.key_or_group] = str(override.value())
    if chosen["engine"] != chosen["optim"]:
        raise ConfigError(
            f"engine={chosen['engine']} does not go with optim={chosen['optim']}: "
            "give both engine=megatron and optim=megatron, or neither"
        )
    return chosen["engine"]


def known_keys(defaults: DictConfig) -> KnownKeys:
    """The keys of a composed configuration, those of inner sections after the section."""

    def walk(node: DictConfig, prefix: str) -> Iterator[tuple[str, bool]]:
        for key in map(str, node):
            child = node._get_node(key)
            is_section = isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation()
            yield prefix + key, is_section
            if isinstance(child, DictConfig) and is_section:
                yield from walk(child, f"{prefix}{key}.")

    return dict(walk(defaults, ""))


def check_overrides(overrides: Sequence[Override], engine: str, keys_of: Callable[[str], KnownKeys]) -> None:
    """Refuse the first override of something that the configuration does not have.

    Args:
        overrides: what the user gave.
        engine: the chosen one.
        keys_of: gives the keys of a configuration with an engine; asked for the other one only if a key is unknown.

    Raises:
        ConfigError: with the key that must have been meant, where one is like it.
    """
    known = keys_of(engine)
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if override.is_delete():
            raise ConfigError(f"{key} cannot be removed from the configuration: leave out {override.input_line!r}")
        if key in _GROUPS and not isinstance(value, dict):
            _check_group(override)
        elif not known.get(key):
            _check_key(key, override, engine, keys_of)
        elif isinstance(value, dict):
            for name in _nested_names(value):
                _check_key(f"{key}.{name}", override, engine, keys_of)
        else:
            raise ConfigError(f"{key} is a section: set the keys in it, which are {', '.join(_names(key, known))}")


def _check_group(override: Override) -> None:
    group, choices = override.key_or_group, _GROUPS[override.key_or_group]
    if override.is_add() or override.package is not None or override.value() not in choices:
        raise ConfigError(
            f"{override.input_line!r} cannot train a speculator: {group} must be {' or '.join(choices)}, "
            f"as in {group}={choices[0]}"
        )


def _check_key(key: str, override: Override, engine: str, keys_of: Callable[[str], KnownKeys]) -> None:
    known = keys_of(engine)
    if key in known:
        if override.is_add() and not known[key]:
            raise ConfigError(f"{key} is there already: write {key}=... without the plus sign")
        return
    # The key may be right with the other engine: say so before looking for one that is spelled like it.
    (other,) = set(ENGINES) - {engine}
    foreign = [name for name in keys_of(other) if name not in known]
    if other == "fsdp":
        foreign.append(UNLISTED_KEYS[-1])
    _refuse_foreign(key, foreign, engine, other)

    can_be_added = key in UNLISTED_KEYS or key.startswith(tuple(f"{section}." for section in _OPEN_SECTIONS))
    if can_be_added and (override.is_add() or override.is_force_add()):
        return
    # In an open section any name may be right, so a likeness to a key elsewhere says nothing.
    near = _nearest_sibling(key, known) if can_be_added else _nearest(key, known)
    meant = nearest_name(key, foreign, cutoff=0.85)
    if meant is not None and (near is None or nearest_name(key, (near, meant), cutoff=0) == meant):
        raise ConfigError(f"{key} is not a configuration key; did you mean {meant}, of engine={other}?")
    if can_be_added and (near is None or key in UNLISTED_KEYS):
        raise ConfigError(f"{key} is not among the defaults: add it with a plus sign, +{key}=...")
    if near is None:
        section = key.rpartition(".")[0]
        section = section if known.get(section) else ""
        where = f"{section} has" if section else "the sections are"
        raise ConfigError(f"{key} is not a configuration key; {where} {', '.join(_names(section, known))}")
    raise ConfigError(f"{key} is not a configuration key; did you mean {near}?")


def _refuse_foreign(key: str, foreign: Sequence[str], engine: str, other: str) -> None:
    """Raise if `key`, or a section around it, is a setting of the engine that was not chosen."""
    parts = key.split(".")
    around = (".".join(parts[:length]) for length in range(2, len(parts) + 1))
    own = next((name for name in around if name in foreign), None)
    if own is None:
        return
    counterparts = dict(_COUNTERPARTS) if other == "fsdp" else {theirs: ours for ours, theirs in _COUNTERPARTS}
    if own in counterparts:
        advice = f"with engine={engine} set {counterparts[own]}"
    elif other == "megatron":
        advice = "give engine=megatron optim=megatron to train on Megatron, or leave it out"
    else:
        advice = f"leave it out with engine={engine}"
    raise ConfigError(f"{own} is a setting of engine={other}: {advice}")


def _nearest(key: str, known: KnownKeys) -> str | None:
    """The likeliest key: one like it in its section, else in any section, by its whole name or its last part."""
    section, _, name = key.rpartition(".")
    sibling = _nearest_sibling(key, known)
    if sibling is not None:
        return sibling
    if _OTHER_NAMES.get(name) in known:
        return _OTHER_NAMES[name]
    near = None if section in known else nearest_name(key, known)
    if near is not None:
        return near
    # The first of those that end alike: the sections of most interest come first.
    by_name = {other.rpartition(".")[2]: other for other in reversed(list(known)) if not known[other]}
    near = nearest_name(name, by_name, cutoff=0.8)
    return by_name[near] if near is not None else None


def _nearest_sibling(key: str, known: KnownKeys) -> str | None:
    section, dot, name = key.rpartition(".")
    near = nearest_name(name, _names(section, known))
    return f"{section}{dot}{near}" if near is not None else None


def _names(section: str, known: KnownKeys) -> list[str]:
    names = (key.rpartition(".") for key in known)
    return [name for parent, _, name in names if parent == section and not name.startswith("_")]


def _nested_names(values: Mapping[Any, Any]) -> Iterator[str]:
    for key, value in values.items():
        yield str(key)
        if isinstance(value, Mapping):
            yield from (f"{key}.{name}" for name in _nested_names(value))


# Composing is slow, and a command under Ray reads its configuration twice.
@functools.cache
def _known_keys_of(search_path: str, engine: str) -> KnownKeys:
    return known_keys(compose(CONFIG_NAME, [search_path, f"engine={engine}", f"optim={engine}"]))


def verl_config_dir() -> Path:
    spec = importlib.util.find_spec("verl")
    if spec is None or spec.origin is None:
        raise ConfigError("verl is not installed: pip install 'verl_speculator[train]'")
    return Path(spec.origin).parent / "trainer" / "config"


def _resolve_paths(config: DictConfig) -> None:
    """Make local paths absolute: Ray workers may stand elsewhere, and neither verl nor Hugging Face reads `~`."""

    def absolute(path: Any) -> Any:
        if not isinstance(path, str) or not path:
            return path
        expanded = os.path.expanduser(path)
        # What is not there may be a name on the Hugging Face hub or of a remote file.
        return os.path.abspath(expanded) if os.path.exists(expanded) else expanded

    for key in _INPUT_PATHS:
        value = OmegaConf.select(config, key)
        if value is not None:
            OmegaConf.update(config, key, list(map(absolute, value)) if OmegaConf.is_list(value) else absolute(value))
    # These may be made yet.
    for key in ("trainer.default_local_dir", "data.hidden_states_cache"):
        folder = OmegaConf.select(config, key)
        if isinstance(folder, str):
            OmegaConf.update(config, key, os.path.abspath(os.path.expanduser(folder)))


def quoted(text: str) -> str:
    """`text` as a value in Hydra's grammar, whatever is in it."""
    return "'" + text.replace("'", "\\'") + "'"


def first_line(error: Exception) -> str:
    """What a Hydra or OmegaConf error says, without the lines of context that follow."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    keys = [line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")]
    return f"{keys[0]}: {lines[0]}" if keys else lines[0]
