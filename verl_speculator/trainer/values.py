"""Values of the configuration that cannot work, each on its own or together with another."""

from __future__ import annotations

import math

from omegaconf import DictConfig, OmegaConf

from verl_speculator.errors import ConfigError
from verl_speculator.trainer import fsdp_values, megatron_values
from verl_speculator.trainer.parallelism import data_parallel_size, engine_name, model_parallel_sizes
from verl_speculator.trainer.rules import (
    Rule,
    check_rules,
    is_bool,
    is_int,
    is_int_from_0,
    is_number,
    is_number_from_0,
    is_positive_int,
    one_of,
)


def check_values(config: DictConfig, world_size: int) -> None:
    """Raise :class:`ConfigError` for the first value that cannot work on ``world_size`` processes."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{missing[0]} must be given, as in {missing[0]}=...")
    check_rules(config, _RULES)
    if engine_name(config) == "megatron":
        megatron_values.check_megatron_values(config)
    else:
        fsdp_values.check_fsdp_values(config)
    _check_batches(config, world_size)
    _check_unsupported(config)


def refuse_on_cpu(config: DictConfig) -> None:
    """Raise :class:`ConfigError` for a setting that needs an accelerator."""
    if engine_name(config) == "megatron":
        megatron_values.refuse_on_cpu(config)
    else:
        fsdp_values.refuse_on_cpu(config)
    for key in ("param_offload", "optimizer_offload", "offload_policy"):
        if config.engine.get(key):
            raise ConfigError(f"engine.{key}=true has no meaning on CPU: everything is there already")


_RULES = (
    Rule(
        "a positive integer",
        is_positive_int,
        (
            "data.train_batch_size",
            "data.micro_batch_size_per_gpu",
            "data.max_length",
            "data.max_token_len_per_gpu",
            "trainer.total_epochs",
            "trainer.nnodes",
            "trainer.n_gpus_per_node",
        ),
    ),
    Rule(
        "null or a positive integer",
        lambda value: value is None or is_positive_int(value),
        ("trainer.total_training_steps",),
    ),
    Rule("0 or a positive integer", is_int_from_0, ("data.num_workers", "model.lora_rank")),
    Rule("a positive number", lambda value: is_number(value) and value > 0, ("optim.lr", "optim.clip_grad")),
    Rule("0 or a positive number", is_number_from_0, ("model.speculator_loss_coeff",)),
    Rule("an integer", is_int, ("data.train_max_samples", "data.val_max_samples")),
    Rule(
        "an integer or after_each_epoch",
        lambda value: value == "after_each_epoch" or is_int(value),
        ("trainer.save_freq", "trainer.test_freq"),
    ),
    Rule(
        "true or false",
        is_bool,
        (
            "model.freeze_base_model",
            "model.detach_hidden_states",
            "model.use_remove_padding",
            "data.use_dynamic_bsz",
            "trainer.val_before_train",
            "trainer.val_only",
        ),
    ),
    Rule("null, bf16 or fp32", one_of(None, "bf16", "fp32"), ("model.speculator_dtype",)),
    Rule("a path", lambda value: isinstance(value, str) and value != "", ("model.path", "trainer.default_local_dir")),
    Rule(
        "null or a path",
        lambda value: value is None or (isinstance(value, str) and value != ""),
        ("model.speculator_path", "trainer.resume_from_path"),
    ),
)


def _check_batches(config: DictConfig, world_size: int) -> None:
    _check_processes(config, world_size)
    ranks = data_parallel_size(config, world_size)
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


def _check_processes(config: DictConfig, world_size: int) -> None:
    sizes = model_parallel_sizes(config)
    product = math.prod(sizes.values())
    if world_size % product == 0:
        return
    # Those that are 1 have no part in it.
    factors = [f"{key}={size}" for key, size in sizes.items() if size > 1]
    result = f" = {product}" if len(factors) > 1 else ""
    raise ConfigError(f"{' x '.join(factors)}{result} must divide the {world_size} processes")


def _check_unsupported(config: DictConfig) -> None:
    if config.engine.forward_only is not False:
        raise ConfigError("engine.forward_only must be false: use trainer.val_only=true to evaluate only")
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
