"""A speculator's folder: its configuration, whether it fits a base, and its weights."""

from __future__ import annotations

from pathlib import Path

import torch

from verl_speculator.errors import CheckpointError, ConfigError, MissingFileError
from verl_speculator.models import Speculator, SpeculatorConfig
from verl_speculator.models.serialization import BIN_NAME, CONFIG_NAME, SAFETENSORS_NAME, find_folder, read_config

_KEY = "--speculator"


def read_speculator_config(path: Path) -> SpeculatorConfig:
    """:raises SpeculatorError: it, or its weights, are not there or not usable; the message begins with the flag"""
    try:
        folder = find_folder(path)
        file = folder / CONFIG_NAME
        if not any((folder / name).is_file() for name in (SAFETENSORS_NAME, BIN_NAME)):
            raise MissingFileError(f"{folder} holds no weights: neither {SAFETENSORS_NAME} nor {BIN_NAME}.")
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
    for name, own, wanted in (
        ("hidden size", config.input_hidden_dim, hidden_size),
        ("vocabulary size", config.vocab_size, vocab_size),
    ):
        if own != wanted:
            raise ConfigError(
                f"{_KEY}: the speculator in {str(path)!r} was trained for {name} {own} and the base has {wanted}; "
                "give the base model that it was trained on"
            )
