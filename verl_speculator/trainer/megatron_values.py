"""Values that cannot work with ``engine=megatron``. Checked on verl 0.9.1 and Megatron-core 0.16.1; imports neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_speculator.errors import ConfigError
from verl_speculator.trainer.parallelism import MEGATRON_SIZES
from verl_speculator.trainer.rules import (
    Rule,
    check_rules,
    is_bool,
    is_number,
    is_number_from_0,
    is_positive_int,
    one_of,
)

_RULES = (
    Rule("a positive integer", is_positive_int, [f"engine.{name}" for name in MEGATRON_SIZES]),
    Rule("null, bf16 or fp32", one_of(None, "bf16", "fp32"), ("engine.model_dtype",)),
    Rule("null, true or false", one_of(None, True, False), ("engine.vanilla_mbridge",)),
    Rule("true or false", is_bool, ("engine.sequence_parallel", "engine.use_distributed_optimizer")),
    Rule("0 or a positive number", is_number_from_0, ("optim.min_lr", "optim.lr_warmup_init", "optim.weight_decay")),
    Rule(
        "constant, linear, cosine, inverse-square-root or WSD",
        one_of("constant", "linear", "cosine", "inverse-square-root", "WSD"),
        ("optim.lr_decay_style",),
    ),
    Rule(
        "null or a positive integer",
        lambda value: value is None or is_positive_int(value),
        ("optim.lr_decay_steps", "optim.lr_wsd_decay_steps"),
    ),
    Rule(
        "null or a number from 0 on and below 1",
        lambda value: value is None or (is_number(value) and 0 <= value < 1),
        ("optim.lr_warmup_steps_ratio",),
    ),
)

# What each key must be, and why or what to do instead.
_UNSUPPORTED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("engine.strategy", one_of("megatron"), "be megatron with engine=megatron: leave it out"),
    ("engine.dtype", one_of("bfloat16"), "be left alone: set engine.model_dtype=bf16 or fp32 instead"),
    (
        "engine.virtual_pipeline_model_parallel_size",
        one_of(None, 1),
        "be null: interleaved pipeline stages are not supported",
    ),
    ("engine.expert_model_parallel_size", one_of(1), "be 1: expert parallelism is not supported"),
    (
        "engine.dynamic_context_parallel",
        one_of(False),
        "be false: a fixed engine.context_parallel_size is what is supported",
    ),
    (
        "engine.use_dist_checkpointing",
        one_of(False),
        "be false: the base model is read from its Hugging Face folder, and checkpoints are this package's own",
    ),
    ("engine.use_megatron_fsdp", one_of(False), "be false: give engine=fsdp optim=fsdp to shard the base model"),
    ("engine.use_mbridge", one_of(True), "be true: verl's Megatron engine reads the base model through a bridge"),
    ("engine.qat.enable", one_of(False), "be false: quantization-aware training is not supported"),
    ("engine.router_replay.mode", one_of("disabled"), "be disabled: a replay needs the routes of a rollout"),
    ("model.mtp.enable", one_of(False), "be false: the base model trains without its multi-token prediction"),
    ("optim.optimizer", one_of("adam"), "be adam: no other optimizer is supported with engine=megatron"),
)

# Settings of the optimizer or the gradients of the base, which has none of them while it is frozen.
_JOINT_ONLY = ("optim.use_precision_aware_optimizer", "optim.override_optimizer_config", "engine.override_ddp_config")


def check_megatron_values(config: DictConfig) -> None:
    """Raise :class:`ConfigError` for the first value that cannot work."""
    check_rules(config, _RULES)
    for key, is_supported, must in _UNSUPPORTED:
        value = OmegaConf.select(config, key)
        if not is_supported(value):
            raise ConfigError(f"{key}={value} cannot work: it must {must}")
    _check_base(config)
    _check_schedule(config)


def refuse_on_cpu(config: DictConfig) -> None:
    """Raise :class:`ConfigError` for a setting that needs an accelerator."""
    if config.engine.context_parallel_size > 1:
        raise ConfigError(
            "engine.context_parallel_size must be 1 on CPU: "
            "Megatron-core's attention without TransformerEngine has no context parallelism"
        )
    if config.engine.vanilla_mbridge is False:
        raise ConfigError(
            "engine.vanilla_mbridge=false cannot run on CPU: Megatron-Bridge needs a GPU, so leave it null for mbridge"
        )
    if config.optim.use_precision_aware_optimizer:
        raise ConfigError("optim.use_precision_aware_optimizer must be false on CPU: it needs TransformerEngine")


def _check_base(config: DictConfig) -> None:
    engine, model = config.engine, config.model
    if engine.use_remove_padding is not model.use_remove_padding:
        raise ConfigError(
            "engine.use_remove_padding follows model.use_remove_padding: set model.use_remove_padding="
            f"{str(engine.use_remove_padding).lower()} instead"
        )
    if OmegaConf.select(config, "engine.override_transformer_config.fp16"):
        raise ConfigError("engine.override_transformer_config.fp16 must be false: float16 is not supported")
    if not model.freeze_base_model:
        if engine.context_parallel_size > 1:
            raise ConfigError(
                f"engine.context_parallel_size={engine.context_parallel_size} must be 1 in joint training: "
                "context parallelism needs model.freeze_base_model=true"
            )
        return
    for key in _JOINT_ONLY:
        if OmegaConf.select(config, key):
            raise ConfigError(
                f"{key} is a setting for training the base model, and model.freeze_base_model=true: leave it out, "
                "or train jointly with model.freeze_base_model=false"
            )


def _check_schedule(config: DictConfig) -> None:
    """What Megatron's scheduler asserts, as far as it can be known before the data are read."""
    optim = config.optim
    for key in ("min_lr", "lr_warmup_init"):
        if optim[key] > optim.lr:
            raise ConfigError(f"optim.{key}={optim[key]} must not be above optim.lr={optim.lr}")
    if optim.lr_decay_style == "WSD" and optim.lr_wsd_decay_steps is None:
        raise ConfigError("optim.lr_decay_style=WSD needs optim.lr_wsd_decay_steps")
    key = "optim.lr_decay_steps" if optim.lr_decay_steps is not None else "trainer.total_training_steps"
    steps, warmup = OmegaConf.select(config, key), optim.lr_warmup_steps
    if steps is not None and warmup is not None and warmup >= steps:
        raise ConfigError(f"optim.lr_warmup_steps={warmup} must be less than {key}={steps}")
