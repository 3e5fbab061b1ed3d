"""Composing the run's configuration: ours on top of verl's ``sft_trainer_engine``, then the command line.

Nothing of verl is imported, so that a mistyped key is answered at once.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_speculator.errors import ConfigError
from verl_speculator.trainer.engine_keys import ENGINES, OtherEngine
from verl_speculator.trainer.overrides import (
    KnownKeys,
    check_overrides,
    chosen_engine,
    first_line,
    known_keys,
    only_in,
    parse_overrides,
    quoted,
)

CONFIG_NAME = "speculator_sft"

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
_OUTPUT_PATH = "trainer.default_local_dir"


def config_dir() -> Path:
    """``configs/`` of the checkout, or its copy inside an installed package."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def load_config(overrides: Sequence[str]) -> DictConfig:
    """The configuration with ``key=value`` overrides applied, and interpolations and local paths resolved.

    :raises ConfigError: an override that does not parse, or a key that does not exist, with the nearest one that does
    """
    parsed = parse_overrides(overrides)
    search_path = "hydra.searchpath=[" + quoted(f"file://{_verl_config_dir()}") + "]"
    try:
        engine = chosen_engine(parsed)
        with initialize_config_dir(str(config_dir()), version_base=None):
            check_overrides(parsed, _known_keys(search_path, engine), _other_engine(search_path, engine))
            config = compose(CONFIG_NAME, [search_path, *(str(override.input_line) for override in parsed)])
        if {"model.path", "model.partial_pretrain"} <= {override.key_or_group for override in parsed}:
            _check_same_base_model(config)
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(first_line(error)) from error
    _resolve_paths(config)
    config.model.partial_pretrain = config.model.path
    return config


@functools.cache
def _known_keys(search_path: str, engine: str) -> KnownKeys:
    return known_keys(compose(CONFIG_NAME, [search_path, f"engine={engine}", f"optim={engine}"]))


def _other_engine(search_path: str, engine: str) -> OtherEngine:
    (other,) = (name for name in ENGINES if name != engine)
    return OtherEngine(other, lambda: only_in(other, _known_keys(search_path, other), _known_keys(search_path, engine)))


def _verl_config_dir() -> Path:
    spec = importlib.util.find_spec("verl")
    if spec is None or spec.origin is None:
        raise ConfigError("verl is not installed: pip install 'verl>=0.9.1,<0.10'")
    return Path(spec.origin).parent / "trainer" / "config"


def _check_same_base_model(config: DictConfig) -> None:
    if config.model.path != config.model.partial_pretrain:
        raise ConfigError("model.path and model.partial_pretrain are two names for one setting: give one of them")


def _resolve_paths(config: DictConfig) -> None:
    """Make local paths absolute: Ray workers may stand elsewhere, and neither verl nor Hugging Face reads ``~``."""
    for key in _INPUT_PATHS:
        value = OmegaConf.select(config, key)
        if isinstance(value, str):
            OmegaConf.update(config, key, _absolute_if_there(value))
        elif OmegaConf.is_list(value):
            OmegaConf.update(config, key, [_absolute_if_there(v) if isinstance(v, str) else v for v in value])
    if isinstance(config.trainer.default_local_dir, str):
        OmegaConf.update(config, _OUTPUT_PATH, os.path.abspath(os.path.expanduser(config.trainer.default_local_dir)))


def _absolute_if_there(path: str) -> str:
    # What is not there may be a name on the Hugging Face hub or of a remote file.
    expanded = os.path.expanduser(path)
    return os.path.abspath(expanded) if path and os.path.exists(expanded) else expanded
