"""Values of the configuration that cannot work, each on its own or together with another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_speculator.errors import ConfigError


def check_values(config: DictConfig, world_size: int) -> None:
    """Raise :class:`ConfigError` for the first value that cannot work on ``world_size`` processes."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{missing[0]} must be given, as in {missing[0]}=...")
    for right, is_right, keys in _RULES:
        for key in keys:
            value = OmegaConf.select(config, key)
            if not is_right(value):
                raise ConfigError(f"{key} must be {right}, got {value!r}")
    _check_batches(config, world_size)
    _check_unsupported(config)


def refuse_on_cpu(config: DictConfig) -> None:
    """Raise :class:`ConfigError` for a setting that needs an accelerator."""
    if config.engine.strategy == "fsdp":
        raise ConfigError("engine.strategy=fsdp cannot run on CPU: use engine.strategy=fsdp2")
    if config.engine.ulysses_sequence_parallel_size > 1:
        raise ConfigError("engine.ulysses_sequence_parallel_size must be 1 on CPU: it needs flash attention")
    for key in ("param_offload", "optimizer_offload", "offload_policy"):
        if config.engine.get(key):
            raise ConfigError(f"engine.{key}=true has no meaning on CPU: everything is there already")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive_int(value: Any) -> bool:
    return _is_int(value) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_RULES: Sequence[tuple[str, Callable[[Any], bool], Sequence[str]]] = (
    (
        "a positive integer",
        _is_positive_int,
        (
            "data.train_batch_size",
            "data.micro_batch_size_per_gpu",
            "data.max_length",
            "data.max_token_len_per_gpu",
            "engine.ulysses_sequence_parallel_size",
            "trainer.total_epochs",
            "trainer.nnodes",
            "trainer.n_gpus_per_node",
        ),
    ),
    (
        "null or a positive integer",
        lambda value: value is None or _is_positive_int(value),
        ("trainer.total_training_steps",),
    ),
    ("0 or a positive integer", lambda value: _is_int(value) and value >= 0, ("data.num_workers", "model.lora_rank")),
    ("a positive number", lambda value: _is_number(value) and value > 0, ("optim.lr", "optim.clip_grad")),
    ("0 or a positive number", lambda value: _is_number(value) and value >= 0, ("model.speculator_loss_coeff",)),
    ("an integer", _is_int, ("data.train_max_samples", "data.val_max_samples")),
    (
        "an integer or after_each_epoch",
        lambda value: value == "after_each_epoch" or _is_int(value),
        ("trainer.save_freq", "trainer.test_freq"),
    ),
    (
        "true or false",
        lambda value: isinstance(value, bool),
        (
            "model.freeze_base_model",
            "model.detach_hidden_states",
            "model.use_remove_padding",
            "data.use_dynamic_bsz",
            "trainer.val_before_train",
            "trainer.val_only",
        ),
    ),
    (
        "a path",
        lambda value: isinstance(value, str) and value != "",
        ("model.path", "trainer.default_local_dir"),
    ),
    (
        "null or a path",
        lambda value: value is None or (isinstance(value, str) and value != ""),
        ("model.speculator_path", "trainer.resume_from_path"),
    ),
)


def _check_batches(config: DictConfig, world_size: int) -> None:
    sequence_parallel = config.engine.ulysses_sequence_parallel_size
    if world_size % sequence_parallel:
        raise ConfigError(
            f"engine.ulysses_sequence_parallel_size={sequence_parallel} must divide the {world_size} processes"
        )
    if sequence_parallel > 1 and not config.model.use_remove_padding:
        raise ConfigError("engine.ulysses_sequence_parallel_size above 1 needs model.use_remove_padding=true")
    ranks = world_size // sequence_parallel
    batch_size, micro_batch_size = config.data.train_batch_size, config.data.micro_batch_size_per_gpu
    if batch_size % ranks:
        raise ConfigError(f"data.train_batch_size={batch_size} must be divisible by the {ranks} data-parallel ranks")
    if not config.data.use_dynamic_bsz and (batch_size // ranks) % micro_batch_size:
        raise ConfigError(
            f"data.train_batch_size={batch_size} gives {batch_size // ranks} rows a rank, which "
            f"data.micro_batch_size_per_gpu={micro_batch_size} must divide when data.use_dynamic_bsz=false"
        )
    if config.data.use_dynamic_bsz and config.data.max_length > config.data.max_token_len_per_gpu:
        raise ConfigError(
            f"data.max_length={config.data.max_length} must not exceed "
            f"data.max_token_len_per_gpu={config.data.max_token_len_per_gpu} when data.use_dynamic_bsz=true"
        )


def _check_unsupported(config: DictConfig) -> None:
    if config.engine.strategy not in ("fsdp", "fsdp2"):
        raise ConfigError(f"engine.strategy must be fsdp2 or fsdp, got {config.engine.strategy!r}")
    if config.engine.forward_only is not False:
        raise ConfigError("engine.forward_only must be false: use trainer.val_only=true to evaluate only")
    if config.model.speculator_dtype not in (None, "bf16", "fp32"):
        raise ConfigError(f"model.speculator_dtype must be null, bf16 or fp32, got {config.model.speculator_dtype!r}")
    precision = config.engine.get("mixed_precision") or {}
    if precision.get("param_dtype") in ("fp16", "float16"):
        raise ConfigError("engine.mixed_precision.param_dtype must be bf16 or fp32: float16 is not supported")
    if config.data.pad_mode != "no_padding":
        raise ConfigError(
            "data.pad_mode must be no_padding; for padded batches set model.use_remove_padding=false instead"
        )
    if config.model.use_fused_kernels is not False:
        raise ConfigError("model.use_fused_kernels must be false: fused kernels hide the hidden states that are needed")
    if config.model.lora_rank > 0 or config.model.lora_adapter_path is not None:
        raise ConfigError(
            "model.lora_rank must be 0 and model.lora_adapter_path null: a speculator trains on a base model without "
            "LoRA, so merge the adapter into the base model first"
        )
