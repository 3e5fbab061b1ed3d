"""Finding out whether what a user named is a speculator that this package can serve."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_speculator.base_model.files import is_hub_name
from verl_speculator.errors import CheckpointError, ConfigError, MissingFileError
from verl_speculator.models import SpeculatorConfig
from verl_speculator.models.config import algorithm_names, config_class_named
from verl_speculator.models.serialization import CONFIG_NAME, WEIGHT_PATTERNS, find_folder, read_config


@dataclass(frozen=True)
class ServedSpeculator:
    """A speculator as the user named it: a folder, or a name on the Hugging Face hub.

    Workers may run on other machines, so it is looked for again where the weights are read.
    """

    source: str
    revision: str | None
    config: SpeculatorConfig
    is_folder: bool

    def folder(self, cache_dir: str | None = None) -> Path:
        """The local folder with its weights; a hub name is downloaded or taken from the cache.

        Raises:
            MissingFileError: It is a folder, and this machine has no such folder.
        """
        if self.is_folder:
            if not Path(self.source).is_dir():
                raise MissingFileError(
                    f"the speculator {self.source!r} is not on {socket.gethostname()}, where a worker of vLLM runs: "
                    "give every machine the folder under this path, or name a speculator on the hub."
                )
            return find_folder(self.source)
        from huggingface_hub import snapshot_download

        files = [CONFIG_NAME, *WEIGHT_PATTERNS]
        return Path(snapshot_download(self.source, revision=self.revision, cache_dir=cache_dir, allow_patterns=files))


def find_speculator(name: str, revision: str | None = None) -> ServedSpeculator | None:
    """The speculator that `name` stands for: a folder, a `global_step_N`, or a hub name; None if it is something else.

    Raises:
        CheckpointError: it is one, but its `config.json` is not usable.
    """
    config_file = _local_config(name) if Path(name).is_dir() else _hub_config(name, revision)
    if config_file is None:
        return None
    try:
        values = read_config(config_file)
    except CheckpointError:
        return None  # not ours to explain
    if not is_speculator(values):
        return None
    try:
        return ServedSpeculator(name, revision, SpeculatorConfig.from_dict(values), Path(name).is_dir())
    except ConfigError as error:
        raise CheckpointError(f"{config_file} is not usable: {error}") from error


def is_speculator(values: dict[str, Any]) -> bool:
    """Whether the contents of a `config.json` name a speculator of ours that vLLM cannot draft with by itself.

    Those that it can, such as EAGLE-3, are left to it.
    """
    name = values.get("speculators_model_type")
    if name is not None:
        return name in algorithm_names() and not config_class_named(name).served_by_vllm
    architectures = values.get("architectures")
    names = architectures if isinstance(architectures, list) else [architectures]
    return any(isinstance(name, str) and name in known_architectures() for name in names)


def known_architectures() -> set[str]:
    ours = (config_class for config_class in _subclasses(SpeculatorConfig) if not config_class.served_by_vllm)
    return set().union(*(config_class.architectures for config_class in ours))


def number_of_drafts(config: SpeculatorConfig, wanted: int | None) -> int:
    """`num_speculative_tokens`: `wanted`, or all heads; a ConfigError for more than the speculator has."""
    if wanted is None:
        return config.n_predict
    if not 1 <= wanted <= config.n_predict:
        raise ConfigError(
            f"num_speculative_tokens must be from 1 to the speculator's n_predict ({config.n_predict}), not {wanted}."
        )
    return wanted


def _local_config(name: str) -> Path | None:
    try:
        return find_folder(name) / CONFIG_NAME
    except MissingFileError:
        return None


def _hub_config(name: str, revision: str | None) -> Path | None:
    if not is_hub_name(name):
        return None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, CONFIG_NAME, revision=revision))
    except Exception:
        # Absent, private, offline: vLLM is about to look for the same file and explains it to the user.
        return None


def _subclasses(config_class: type[SpeculatorConfig]) -> list[type[SpeculatorConfig]]:
    direct = config_class.__subclasses__()
    return [*direct, *(below for child in direct for below in _subclasses(child))]
