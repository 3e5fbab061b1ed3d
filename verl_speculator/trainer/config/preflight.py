"""Everything about a run that can be known to be wrong before a model is loaded."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_speculator.adapters import SpeculatorAdapter, build_speculator_adapter
from verl_speculator.base_model.files import BaseSizes, check_base_files
from verl_speculator.checkpoint.layout import check_intact, find_resume_path
from verl_speculator.data.chats import check_file, check_training_file, resolve_files
from verl_speculator.errors import CheckpointError, ConfigError, MissingFileError
from verl_speculator.trainer.config.compose import engine_name
from verl_speculator.trainer.config.megatron import check_layout, check_packages
from verl_speculator.trainer.config.rules import check_values
from verl_speculator.trainer.hidden_states import check_states_cache
from verl_speculator.trainer.resuming import check_same_run


def check_run(
    config: DictConfig, world_size: int, *, read_weights: bool = True, workers_elsewhere: bool = False
) -> None:
    """Find the first thing that cannot work.

    Args:
        config: the run's configuration.
        world_size: processes of the run; each trains on one device.
        read_weights: also read the speculator to start from and the checkpoint to resume from, to find out whether
            they are whole.
        workers_elsewhere: this process drives workers on other machines, which have packages of their own.

    Raises:
        SpeculatorError: one sentence that names the key or the file, and what would be right.
    """
    # From what costs nothing to what reads whole files, so that most mistakes are answered at once.
    check_values(config, world_size)
    on_megatron = engine_name(config) == "megatron"
    if on_megatron and not workers_elsewhere:
        check_packages(config.engine)
    model: Any = OmegaConf.to_container(config.model)
    # The adapter checks `model.speculator` itself: it may be a user's own, with settings that are not known here.
    adapter = build_speculator_adapter(model["speculator_adapter"], model["speculator"])
    _check_data(config)
    sizes = check_base_files(
        str(config.model.path),
        key="model.path",
        template_key="model.custom_chat_template",
        tokenizer_path=config.model.tokenizer_path,
        has_template=config.model.custom_chat_template is not None,
    )
    if on_megatron and sizes is not None:
        check_layout(config.engine, sizes)
    if config.model.speculator_path is not None and read_weights:
        _check_speculator(adapter, str(config.model.speculator_path), sizes, "model.speculator_path")
    check_states_cache(config)
    _check_output(Path(config.trainer.default_local_dir))
    resume_from = find_resume_path(
        config.trainer.default_local_dir, config.trainer.resume_mode, config.trainer.resume_from_path
    )
    if resume_from is not None and read_weights:
        check_intact(resume_from)
        check_same_run(config, resume_from)
        _check_speculator(adapter, str(resume_from), sizes, "trainer.resume_mode")


def _check_data(config: DictConfig) -> None:
    data = config.data
    rows = _count_rows(data, "train_files", data.train_max_samples)
    if rows < data.train_batch_size:
        raise ConfigError(
            f"data.train_batch_size={data.train_batch_size} is more than the {rows} rows of data.train_files: "
            "lower it or give more data"
        )
    if data.val_files is not None:
        _count_rows(data, "val_files", data.val_max_samples)
        return
    for key in ("val_only", "val_before_train"):
        if config.trainer[key]:
            raise ConfigError(f"trainer.{key}=true needs data.val_files")
    if config.trainer.early_stop_patience is not None:
        raise ConfigError("trainer.early_stop_patience needs data.val_files, of which it counts the validations")


def _count_rows(data: DictConfig, name: str, limit: int) -> float:
    key = f"data.{name}"
    files = resolve_files(data[name], key)
    if data.custom_cls.path is not None:
        # A user's own dataset class knows what it reads.
        for file in files:
            check_file(file, key)
        return math.inf
    rows = sum(check_training_file(file, data.messages_key, key) for file in files)
    return min(rows, limit) if limit > 0 else rows


def _check_speculator(adapter: SpeculatorAdapter, path: str, sizes: BaseSizes | None, key: str) -> None:
    try:
        speculator = adapter.speculator_class.from_pretrained(path)
    except MissingFileError as error:
        raise MissingFileError(f"{key}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error
    if sizes is not None:
        speculator.config.check_fits_base(sizes.hidden_size, sizes.vocab_size, f"{key}: the speculator in {path!r}")


def _check_output(root: Path) -> None:
    try:
        # Tried out, since neither permissions nor quotas tell on every file system. Nothing is left behind.
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise ConfigError(
            f"trainer.default_local_dir: cannot write to {str(root)!r} ({error.strerror}); "
            "give a folder in which files can be made"
        ) from error
