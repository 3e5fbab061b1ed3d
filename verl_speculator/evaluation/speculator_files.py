"""A speculator's folder: its configuration, whether it fits a base, and its weights."""

from __future__ import annotations

from pathlib import Path

import torch

from verl_speculator.errors import CheckpointError, ConfigError, MissingFileError
from verl_speculator.models import Speculator, SpeculatorConfig
from verl_speculator.models.serialization import CONFIG_NAME, find_folder, find_weights, read_config

_KEY = "--speculator"


def read_speculator_config(path: Path) -> SpeculatorConfig:
    """:raises SpeculatorError: it, or its weights, are not there or not usable; the message begins with the flag"""
    try:
        folder = find_folder(path)
        file = folder / CONFIG_NAME
        find_weights(folder)
        return SpeculatorConfig.from_dict(read_config(file))
    except MissingFileError as error:
        raise MissingFileError(f"{_KEY}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{_KEY}: {error}") from error
    except ConfigError as error:
        raise CheckpointError(f"{_KEY}: {file} is not usable: {error}") from error


def load_speculator(path: Path, device: torch.device, dtype: torch.dtype) -> Speculator:
    """:raises SpeculatorError: as above, or its weights are missing or damaged"""
    try:
        return Speculator.from_pretrained(path, dtype=dtype, device=device).eval()
    except MissingFileError as error:
        raise MissingFileError(f"{_KEY}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{_KEY}: {error}") from error


def check_fits(config: SpeculatorConfig, hidden_size: int, vocab_size: int, path: Path) -> None:
    """Raise `ConfigError` unless the base has the hidden size and the rows of `lm_head` the speculator was trained for.

    The rows count, padding included: the speculator's own vocabulary matrix has as many.
    """
    config.check_fits_base(hidden_size, vocab_size, f"{_KEY}: the speculator in {str(path)!r}")
