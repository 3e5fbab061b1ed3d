"""Everything about a run that can be known to be wrong before a model is loaded."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_speculator.adapters import build_speculator_adapter
from verl_speculator.adapters.settings import check_base_sizes
from verl_speculator.checkpoint.layout import find_resume_path
from verl_speculator.data.chat_parquet import check_chat_file, resolve_files
from verl_speculator.errors import CheckpointError, ConfigError, MissingFileError
from verl_speculator.models import Speculator

_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")


def check_run(config: DictConfig, world_size: int, *, read_weights: bool = True) -> None:
    """Raise a :class:`SpeculatorError` with one sentence for the first thing that cannot work.

    :param read_weights: also read the speculator to start or resume from, to find out whether it is whole
    """
    _check_values(config, world_size)
    settings = OmegaConf.to_container(config.model.speculator, resolve=True)
    assert isinstance(settings, dict)
    build_speculator_adapter(_plain(config.model.speculator_adapter), {str(key): settings[key] for key in settings})
    _check_data(config)
    sizes = _check_base_model(config)
    if config.model.speculator_path is not None and read_weights:
        _check_speculator(config.model.speculator_path, sizes)
    resume_from = _check_output(config)
    if resume_from is not None and read_weights:
        Speculator.from_pretrained(resume_from)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _check_values(config: DictConfig, world_size: int) -> None:
    missing = sorted(key for key in OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{missing[0]} must be given")
    for key in (
        "data.train_batch_size",
        "data.micro_batch_size_per_gpu",
        "data.max_length",
        "data.max_token_len_per_gpu",
        "trainer.total_epochs",
        "trainer.nnodes",
        "trainer.n_gpus_per_node",
    ):
        _require(config, key, _is_positive_int, "a positive integer")
    _require(config, "data.num_workers", lambda value: _is_int(value) and value >= 0, "0 or a positive integer")
    _require(config, "optim.lr", lambda value: _is_number(value) and value > 0, "a positive number")
    _require(config, "optim.clip_grad", lambda value: _is_number(value) and value > 0, "a positive number")
    _require(config, "model.speculator_loss_coeff", lambda value: _is_number(value) and value >= 0, "0 or more")
    for key in ("model.freeze_base_model", "model.detach_hidden_states", "model.use_remove_padding"):
        _require(config, key, lambda value: isinstance(value, bool), "true or false")
    for key in ("trainer.save_freq", "trainer.test_freq"):
        _require(config, key, lambda value: value == "after_each_epoch" or _is_int(value), "an integer")
    steps = config.trainer.total_training_steps
    if steps is not None and not _is_positive_int(steps):
        raise ConfigError(f"trainer.total_training_steps must be null or a positive integer, got {steps!r}")
    _check_parallelism(config, world_size)
    _check_unsupported(config)


def _check_parallelism(config: DictConfig, world_size: int) -> None:
    sequence_parallel = config.engine.get("ulysses_sequence_parallel_size", 1)
    if world_size % sequence_parallel:
        raise ConfigError(
            f"engine.ulysses_sequence_parallel_size={sequence_parallel} must divide the {world_size} processes"
        )
    if sequence_parallel > 1 and not config.model.use_remove_padding:
        raise ConfigError("engine.ulysses_sequence_parallel_size above 1 needs model.use_remove_padding=true")
    ranks = world_size // sequence_parallel
    batch_size = config.data.train_batch_size
    if batch_size % ranks:
        raise ConfigError(f"data.train_batch_size={batch_size} must be divisible by the {ranks} data-parallel ranks")
    micro = config.data.micro_batch_size_per_gpu
    if not config.data.use_dynamic_bsz and (batch_size // ranks) % micro:
        raise ConfigError(
            f"data.train_batch_size={batch_size} gives {batch_size // ranks} rows a rank, which "
            f"data.micro_batch_size_per_gpu={micro} must divide when data.use_dynamic_bsz=false"
        )
    if config.data.use_dynamic_bsz and config.data.max_length > config.data.max_token_len_per_gpu:
        raise ConfigError(
            f"data.max_length={config.data.max_length} must not exceed "
            f"data.max_token_len_per_gpu={config.data.max_token_len_per_gpu} when data.use_dynamic_bsz=true"
        )


def _check_unsupported(config: DictConfig) -> None:
    strategy = config.engine.get("strategy", "fsdp2")
    if strategy not in ("fsdp", "fsdp2"):
        raise ConfigError(f"engine.strategy must be fsdp2 or fsdp, got {strategy!r}")
    if config.data.pad_mode != "no_padding":
        raise ConfigError(
            "data.pad_mode must be no_padding; for padded batches set model.use_remove_padding=false instead"
        )
    if config.model.use_fused_kernels:
        raise ConfigError("model.use_fused_kernels must be false: fused kernels hide the hidden states that are needed")
    if config.model.freeze_base_model and (config.model.lora_rank > 0 or config.model.lora_adapter_path):
        raise ConfigError("model.lora_rank needs model.freeze_base_model=false: a frozen base trains no LoRA")
    if not config.model.freeze_base_model and config.model.lora_rank > 0:
        raise ConfigError("model.lora_rank must be 0: joint training with LoRA is not supported")
    if config.engine.get("forward_only", False):
        raise ConfigError("engine.forward_only must be false: use trainer.val_only=true to evaluate only")
    precision = config.engine.get("mixed_precision") or {}
    if precision.get("param_dtype") in ("fp16", "float16"):
        raise ConfigError("engine.mixed_precision.param_dtype must be bf16 or fp32: float16 is not supported")


def _check_data(config: DictConfig) -> None:
    rows = 0
    for path in resolve_files(config.data.train_files, "data.train_files"):
        rows += check_chat_file(path, config.data.messages_key, "data.train_files")
    limit = config.data.train_max_samples
    rows = min(rows, limit) if limit > 0 else rows
    if rows < config.data.train_batch_size:
        raise ConfigError(
            f"data.train_batch_size={config.data.train_batch_size} is more than the {rows} rows of data.train_files: "
            "lower it or give more data"
        )
    if config.data.val_files:
        for path in resolve_files(config.data.val_files, "data.val_files"):
            check_chat_file(path, config.data.messages_key, "data.val_files")


def _check_base_model(config: DictConfig) -> tuple[int, int] | None:
    """Hidden and vocabulary size of a local base model; None for a name that the Hugging Face hub resolves."""
    name = str(config.model.path)
    folder = Path(name).expanduser()
    if not folder.exists():
        looks_like_path = name.startswith(("/", "./", "../", "~")) or name.count("/") != 1
        if looks_like_path:
            raise MissingFileError(f"model.path: there is no folder {name!r}")
        return None
    if not (folder / "config.json").is_file():
        raise MissingFileError(f"model.path: {name!r} has no config.json; a Hugging Face model folder is needed")
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHT_PATTERNS):
        raise MissingFileError(f"model.path: {name!r} has no weights (model*.safetensors or pytorch_model*.bin)")
    try:
        base = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ConfigError(f"model.path: {folder / 'config.json'} is not valid JSON ({error})") from error
    base = base.get("text_config", base)
    if "hidden_size" not in base or "vocab_size" not in base:
        return None
    return base["hidden_size"], base["vocab_size"]


def _check_speculator(path: str, sizes: tuple[int, int] | None) -> None:
    try:
        speculator = Speculator.from_pretrained(path)
    except MissingFileError as error:
        raise MissingFileError(f"model.speculator_path: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"model.speculator_path: {error}") from error
    if sizes is not None:
        check_base_sizes(speculator.config, *sizes, path)


def _check_output(config: DictConfig) -> Path | None:
    """Raise if the run cannot write its checkpoints; the checkpoint from which it will resume, if any."""
    root = Path(config.trainer.default_local_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise ConfigError(f"trainer.default_local_dir: cannot write to {str(root)!r} ({error.strerror})") from error
    return find_resume_path(root, config.trainer.resume_mode, config.trainer.resume_from_path)


def _require(config: DictConfig, key: str, is_right: Any, right: str) -> None:
    value = OmegaConf.select(config, key)
    if not is_right(value):
        raise ConfigError(f"{key} must be {right}, got {value!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive_int(value: Any) -> bool:
    return _is_int(value) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
