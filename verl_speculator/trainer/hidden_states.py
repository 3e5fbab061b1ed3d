"""The folder of `data.hidden_states_cache`: of what base and data it holds hidden states, and what it will take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_speculator.checkpoint.hidden_states import (
    KEY,
    StatesCacheSettings,
    read_description,
    room_for,
    stored_bytes,
    write_description,
)
from verl_speculator.data.chats import resolve_files
from verl_speculator.errors import ConfigError
from verl_speculator.trainer.resuming import ROW_KEYS, describe_files, describe_origin, first_difference

_DTYPE_KEY, _COMPUTE_KEY, _REVISION = "data.hidden_states_dtype", "engine.mixed_precision.param_dtype", "revision"
_TORCH_NAMES = {"bf16": "bfloat16", "fp32": "float32"}
_COMPLETE_FOR = "complete with the validation data"
_SAMPLED_ROWS = 256


def check_states_cache(config: DictConfig) -> None:
    """Refuse a folder with the hidden states of something else, as far as that is known before a device is.

    Raises:
        ConfigError: names the first difference.
    """
    if config.data.hidden_states_cache is not None:
        _check(Path(config.data.hidden_states_cache), _describe(config, None))


def open_states_cache(config: DictConfig, revision: str | None) -> StatesCacheSettings:
    """Make the folder, or make sure that it is of this base and these data; for one process of a run.

    Args:
        config: With the device's number types filled in.
        revision: The commit of the base, where it comes from a hub.

    Raises:
        ConfigError: it holds something else, or cannot be written to.
    """
    folder = Path(config.data.hidden_states_cache)
    description = _describe(config, revision)
    before = _check(folder, description)
    if before is None:
        write_description(folder, description)
    # One that is complete has every row of the training data; validation data are free to change.
    complete_for = (before or {}).get(_COMPLETE_FOR)
    is_complete = complete_for is not None and first_difference(_validation_data(config), complete_for) is None
    gigabytes = config.data.hidden_states_cache_gb
    return StatesCacheSettings(
        folder=str(folder),
        dtype=description[_DTYPE_KEY],
        is_complete=is_complete,
        max_bytes=None if gigabytes is None else int(gigabytes * 1e9),
    )


def mark_complete(config: DictConfig) -> None:
    """Note that the states of every row are there: a run then does without the base's layers."""
    folder = Path(config.data.hidden_states_cache)
    write_description(folder, {**(read_description(folder) or {}), _COMPLETE_FOR: _validation_data(config)})


def plan(config: DictConfig, settings: StatesCacheSettings, bytes_per_token: int, datasets: list[Any]) -> str:
    """What the folder will hold, in a sentence.

    Args:
        bytes_per_token: What is kept of a token.
        datasets: Those of the run, with `input_ids` in each item.

    Raises:
        ConfigError: there is no room for it.
    """
    folder = Path(settings.folder)
    if settings.is_complete:
        size = stored_bytes(folder) / 1e9
        return f"Hidden states are read from {folder} ({size:.3g} GB): of the base's layers only the first is loaded"
    tokens = sum(_estimate_tokens(dataset) for dataset in datasets)
    total, stored = tokens * bytes_per_token, stored_bytes(folder)
    room = room_for(folder, max(total - stored, 0), settings.max_bytes)
    return (
        f"Hidden states are kept in {folder}: about {tokens:,} tokens x {bytes_per_token:,} bytes = {total / 1e9:.3g} "
        f"GB, of which {stored / 1e9:.3g} GB are there; the disk has room for {room / 1e9:.3g} GB more"
    )


def _estimate_tokens(dataset: Any) -> int:
    """From rows spread over the data: rendering all of them would take as long as an epoch's rendering."""
    num_sampled = min(len(dataset), _SAMPLED_ROWS)
    sampled = [dataset[len(dataset) * index // num_sampled]["input_ids"].shape[0] for index in range(num_sampled)]
    return len(dataset) * sum(sampled) // num_sampled


def _describe(config: DictConfig, revision: str | None) -> dict[str, Any]:
    compute = OmegaConf.select(config, _COMPUTE_KEY)
    dtype = config.data.hidden_states_dtype or compute
    return {
        **describe_origin(config),
        _REVISION: revision,
        # A row is found by its tokens: these only tell that a folder would be of no use.
        **{key: str(OmegaConf.select(config, key)) for key in ("model.custom_chat_template", *ROW_KEYS)},
        _COMPUTE_KEY: _TORCH_NAMES.get(compute, compute),
        _DTYPE_KEY: _TORCH_NAMES.get(dtype, dtype),
    }


def _check(folder: Path, description: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the folder says of itself; None if it is new."""
    before = read_description(folder)
    if before is None:
        return None
    for key, value in description.items():
        was = before.get(key)
        if isinstance(value, list):
            difference = first_difference(value, was or ())
            if difference is None:
                continue
            value, was = (item["name"] for item in difference)
            was += " as it was then" if value == was else ""
        # What is not known yet is left open.
        elif value == was or value is None:
            continue
        raise ConfigError(
            f"{KEY}: {str(folder)!r} has the hidden states of {key}={was}, and this run has {value}: "
            "give that or another folder"
        )
    return before


def _validation_data(config: DictConfig) -> list[dict[str, str | None]]:
    if config.data.val_files is None:
        return []
    limit = {"name": f"data.val_max_samples={config.data.val_max_samples}", "fingerprint": None}
    return [*describe_files(resolve_files(config.data.val_files, "data.val_files")), limit]
