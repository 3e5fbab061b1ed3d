"""Reading ``key=value`` overrides, and answering one that cannot be right with the nearest one that is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from verl_speculator.errors import ConfigError
from verl_speculator.trainer.engine_keys import ENGINES, OtherEngine

# Every key's full name, and whether it is a section.
KnownKeys: TypeAlias = Mapping[str, bool]

# A dotted width is a string; unquoted, YAML's rules make it a number and 1024.2050 loses a digit.
_WIDTH = re.compile(r"(\+{0,2}model\.speculator\.\w+_dim)=(\d+(?:\.\d+)+)")

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
# Read by verl, although its configuration files do not list them.
_UNLISTED_KEYS = (
    "data.image_key",
    "data.video_key",
    "data.image_patch_size",
    "data.shuffle",
    "data.seed",
    "engine.mixed_precision",
)
_ONLY_FSDP_READS = ("engine.mixed_precision",)
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


def parse_overrides(texts: Sequence[str]) -> list[Override]:
    """A value that is no Hydra expression, such as ``~/data`` or ``/a=b.parquet``, is taken as it is typed.

    :raises ConfigError: an override that cannot be read
    """
    return [_parse(text) for text in texts]


def chosen_engine(overrides: Sequence[Override]) -> str:
    """The engine that the groups ``engine`` and ``optim`` name.

    :raises ConfigError: a group that cannot train a speculator, or two that do not go together
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
    return dict(_flatten(defaults))


def only_in(engine: str, its_keys: KnownKeys, others_keys: KnownKeys) -> list[str]:
    """The keys that a configuration with ``engine`` has and one with the other engine has not."""
    unlisted = _ONLY_FSDP_READS if engine == "fsdp" else ()
    return [*unlisted, *(key for key in its_keys if key not in others_keys)]


def check_overrides(overrides: Sequence[Override], known: KnownKeys, other: OtherEngine) -> None:
    """Raise :class:`ConfigError` for the first override of something that the configuration does not have."""
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if override.is_delete():
            raise ConfigError(f"{key} cannot be removed from the configuration: leave out {override.input_line!r}")
        if key in _GROUPS and not isinstance(value, dict):
            _check_group(override)
            continue
        _check_key(key, override, known, other)
        if known.get(key):
            if not isinstance(value, dict):
                raise ConfigError(f"{key} is a section: set the keys in it, which are {', '.join(_names(key, known))}")
            for name in _nested_names(value):
                _check_key(f"{key}.{name}", override, known, other)


def quoted(text: str) -> str:
    """``text`` as a value in Hydra's grammar, whatever is in it."""
    return "'" + text.replace("'", "\\'") + "'"


def first_line(error: Exception) -> str:
    """What a Hydra or OmegaConf error says, without the lines of context that follow."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    keys = [line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")]
    return f"{keys[0]}: {lines[0]}" if keys else lines[0]


def _parse(text: str) -> Override:
    width = _WIDTH.fullmatch(text)
    key, equals, value = text.partition("=")
    try:
        override = OverridesParser.create().parse_override(f"{width[1]}={quoted(width[2])}" if width else text)
    except HydraException as error:
        problem = f"{text!r} is not a setting in the form key=value ({first_line(error)})"
        if not equals or value[:1] in ("{", "[", "'", '"'):
            raise ConfigError(problem) from error
        try:
            override = OverridesParser.create().parse_override(f"{key}={quoted(value)}")
        except HydraException:
            raise ConfigError(problem) from error
    if override.is_sweep_override():
        raise ConfigError(
            f"{text!r} asks for several values, and a run has one: write a list as [a,b] and quote a text with commas"
        )
    return override


def _check_group(override: Override) -> None:
    group, choices = override.key_or_group, _GROUPS[override.key_or_group]
    if override.is_add() or override.package is not None or override.value() not in choices:
        raise ConfigError(
            f"{override.input_line!r} cannot train a speculator: {group} must be {' or '.join(choices)}, "
            f"as in {group}={choices[0]}"
        )


def _check_key(key: str, override: Override, known: KnownKeys, other: OtherEngine) -> None:
    if key in known:
        if override.is_add() and not known[key]:
            raise ConfigError(f"{key} is there already: write {key}=... without the plus sign")
        return
    other.refuse(key)
    can_be_added = key in _UNLISTED_KEYS or key.startswith(tuple(f"{section}." for section in _OPEN_SECTIONS))
    if can_be_added and (override.is_add() or override.is_force_add()):
        return
    near = _nearest_sibling(key, known) if can_be_added else _nearest(key, known)
    others = other.nearest(key, near)
    if others is not None:
        raise ConfigError(f"{key} is not a configuration key; did you mean {others}, of engine={other.name}?")
    if can_be_added and (near is None or key in _UNLISTED_KEYS):
        raise ConfigError(f"{key} is not among the defaults: add it with a plus sign, +{key}=...")
    if near is None:
        section = key.rpartition(".")[0]
        section = section if known.get(section) else ""
        where = f"{section} has" if section else "the sections are"
        raise ConfigError(f"{key} is not a configuration key; {where} {', '.join(_names(section, known))}")
    raise ConfigError(f"{key} is not a configuration key; did you mean {near}?")


def _nearest(key: str, known: KnownKeys) -> str | None:
    """The likeliest key: one like it in its section, else in any section, by its whole name or its last part."""
    section, _, name = key.rpartition(".")
    sibling = _nearest_sibling(key, known)
    if sibling is not None:
        return sibling
    if _OTHER_NAMES.get(name) in known:
        return _OTHER_NAMES[name]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) if section not in known else []
    if near:
        return near[0]
    # The first of those that end alike: the sections of most interest come first.
    by_name = {other.rpartition(".")[2]: other for other in reversed(list(known)) if not known[other]}
    near = difflib.get_close_matches(name, by_name, n=1, cutoff=0.8)
    return by_name[near[0]] if near else None


def _nearest_sibling(key: str, known: KnownKeys) -> str | None:
    section, dot, name = key.rpartition(".")
    near = difflib.get_close_matches(name, _names(section, known), n=1, cutoff=0.6)
    return f"{section}{dot}{near[0]}" if near else None


def _names(section: str, known: KnownKeys) -> list[str]:
    names = (key.rpartition(".") for key in known)
    return [name for parent, _, name in names if parent == section and not name.startswith("_")]


def _flatten(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, bool]]:
    for key in map(str, node):
        child = node._get_node(key)
        is_section = isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation()
        yield f"{prefix}{key}", is_section
        if isinstance(child, DictConfig) and is_section:
            yield from _flatten(child, f"{prefix}{key}.")


def _nested_names(values: Mapping[Any, Any]) -> Iterator[str]:
    for key, value in values.items():
        yield str(key)
        if isinstance(value, Mapping):
            yield from (f"{key}.{name}" for name in _nested_names(value))
