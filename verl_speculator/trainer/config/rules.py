"""What the values of a configuration must be, each on its own and together with others.

The sections are pydantic models of those keys that have a rule. A type says in words what is right, and these become
the error: `optim.lr must be a positive number, got 0`. Megatron's rules were checked on verl 0.9.1 and Megatron-core
0.16.1; neither is imported.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal, Self

from omegaconf import DictConfig, OmegaConf
from pydantic import AliasPath, BaseModel, ConfigDict, Field, ValidationError, WrapValidator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from verl_speculator.errors import ConfigError
from verl_speculator.trainer.config.compose import engine_name

# The sizes whose product is the number of processes that work on the same rows.
_PARALLEL_SIZES = {
    "fsdp": ("ulysses_sequence_parallel_size",),
    "megatron": ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
}


def check_values(config: DictConfig, world_size: int) -> None:
    """Raise `ConfigError` for the first value that cannot work on `world_size` processes."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{missing[0]} must be given, as in {missing[0]}=...")
    run = _MegatronRun if engine_name(config) == "megatron" else _FsdpRun
    try:
        run.model_validate(OmegaConf.to_container(config))
    except ValidationError as error:
        # One sentence: the others may follow from the first.
        raise ConfigError(_sentence(error.errors()[0])) from None
    # Only now that sizes are known to be positive integers.
    _check_processes(config, world_size)


def refuse_on_cpu(config: DictConfig) -> None:
    """Raise `ConfigError` for a setting that needs an accelerator."""
    engine = config.engine
    if engine_name(config) == "megatron":
        if engine.context_parallel_size > 1:
            raise ConfigError(
                "engine.context_parallel_size must be 1 on CPU: "
                "Megatron-core's attention without TransformerEngine has no context parallelism"
            )
        if engine.vanilla_mbridge is False:
            raise ConfigError(
                "engine.vanilla_mbridge=false cannot run on CPU: "
                "Megatron-Bridge needs a GPU, so leave it null for mbridge"
            )
        if config.optim.use_precision_aware_optimizer:
            raise ConfigError("optim.use_precision_aware_optimizer must be false on CPU: it needs TransformerEngine")
    elif engine.strategy == "fsdp":
        raise ConfigError("engine.strategy=fsdp cannot run on CPU: use engine.strategy=fsdp2")
    elif engine.ulysses_sequence_parallel_size > 1:
        raise ConfigError("engine.ulysses_sequence_parallel_size must be 1 on CPU: it needs flash attention")
    for key in ("param_offload", "optimizer_offload", "offload_policy"):
        if engine.get(key):
            raise ConfigError(f"engine.{key}=true has no meaning on CPU: everything is there already")


def model_parallel_sizes(config: DictConfig) -> dict[str, int]:
    """Each size under its full key."""
    return {f"engine.{name}": config.engine[name] for name in _PARALLEL_SIZES[engine_name(config)]}


def data_parallel_size(config: DictConfig, world_size: int) -> int:
    """The number of parts into which a batch is cut, where `world_size` has been checked to fit."""
    return world_size // math.prod(model_parallel_sizes(config).values())


def _must_be(right: str, why: str = "") -> WrapValidator:
    """The words for whatever is wrong with a value of the annotated type."""

    def validate(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("must_be", "must be", {"right": right, "why": why}) from None

    return WrapValidator(validate)


def _one_of(*choices: Any, why: str = "") -> WrapValidator:
    """Like `Literal`, which takes 1 for true; the words are the choices."""
    # As they are typed: null, true and false.
    words = [json.dumps(choice).strip('"') for choice in choices]
    right = " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)

    def validate(value: Any, handler: Any) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise PydanticCustomError("must_be", "must be", {"right": right, "why": why})
        return value

    return WrapValidator(validate)


def _sentence(error: ErrorDetails) -> str:
    if error["type"] == "value_error":
        # Raised by a validator of ours, which names the keys itself.
        return str(error["ctx"]["error"])
    key = ".".join(map(str, error["loc"]))
    if error["type"] != "must_be":
        return f"{key}: {error['msg']}"
    why = error["ctx"]["why"]
    return f"{key} must be {error['ctx']['right']}, got {error['input']!r}" + (f": {why}" if why else "")


def _at(*path: str) -> Any:
    """A field for a key of an inner section, absent where that is null."""
    return Field(default=None, validation_alias=AliasPath(*path))


_Bool = Annotated[bool, _one_of(True, False)]
_Int = Annotated[int, _must_be("an integer")]
_PositiveInt = Annotated[int, Field(gt=0), _must_be("a positive integer")]
_PositiveIntOrNull = Annotated[_PositiveInt | None, _must_be("null or a positive integer")]
_IntFrom0 = Annotated[int, Field(ge=0), _must_be("0 or a positive integer")]
_Positive = Annotated[int | float, Field(gt=0, lt=math.inf), _must_be("a positive number")]
_PositiveOrNull = Annotated[_Positive | None, _must_be("null or a positive number")]
_From0 = Annotated[int | float, Field(ge=0, lt=math.inf), _must_be("0 or a positive number")]
_Frequency = Annotated[int | Literal["after_each_epoch"], _must_be("an integer or after_each_epoch")]
_NumberType = Annotated[str | None, _one_of(None, "bf16", "fp32")]
_Path = Annotated[str, Field(min_length=1), _must_be("a path")]
_PathOrNull = Annotated[_Path | None, _must_be("null or a path")]
_NO_LORA = "a speculator trains on a base model without LoRA, so merge the adapter into the base model first"


class _Section(BaseModel):
    # OmegaConf has turned text into numbers already: what is no number now was not meant as one.
    model_config = ConfigDict(strict=True, extra="ignore")


class _Data(_Section):
    train_batch_size: _PositiveInt
    micro_batch_size_per_gpu: _PositiveInt
    max_length: _PositiveInt
    max_token_len_per_gpu: _PositiveInt
    num_workers: _IntFrom0
    train_max_samples: _Int
    val_max_samples: _Int
    use_dynamic_bsz: _Bool
    truncation: Annotated[str, _one_of("right", "error", why="verl cuts rows that are not padded at their end only")]
    hidden_states_cache: _PathOrNull
    hidden_states_dtype: _NumberType
    hidden_states_cache_gb: _PositiveOrNull
    pad_mode: Annotated[str, _one_of("no_padding", why="to pad batches set model.use_remove_padding=false instead")]

    @model_validator(mode="after")
    def _row_fits_into_a_micro_batch(self) -> Self:
        if self.use_dynamic_bsz and self.max_length > self.max_token_len_per_gpu:
            raise ConfigError(
                f"data.max_length={self.max_length} must not exceed "
                f"data.max_token_len_per_gpu={self.max_token_len_per_gpu} when data.use_dynamic_bsz=true"
            )
        return self


class _Model(_Section):
    path: _Path
    speculator_path: _PathOrNull
    speculator_dtype: _NumberType
    speculator_loss_coeff: _From0
    freeze_base_model: _Bool
    save_pytorch_model_bin: _Bool
    detach_hidden_states: _Bool
    speculator_shard_size: _PositiveIntOrNull
    gather_speculator_once: _Bool
    compile: _Bool
    attend_by_sequence: _Bool
    use_remove_padding: _Bool
    use_fused_kernels: Annotated[bool, _one_of(False, why="fused kernels hide the hidden states that are needed")]
    lora_rank: Annotated[int, _one_of(0, why=_NO_LORA)]
    lora_adapter_path: Annotated[None, _one_of(None, why=_NO_LORA)]


class _Trainer(_Section):
    default_local_dir: _Path
    default_hdfs_dir: Annotated[None, _one_of(None, why="checkpoints are not copied: give trainer.default_local_dir")]
    resume_from_path: _PathOrNull
    total_epochs: _PositiveInt
    total_training_steps: _PositiveIntOrNull
    nnodes: _PositiveInt
    n_gpus_per_node: _PositiveInt
    save_freq: _Frequency
    test_freq: _Frequency
    early_stop_patience: _PositiveIntOrNull
    val_before_train: _Bool
    val_only: _Bool


class _Optim(_Section):
    lr: _Positive
    base_lr: _PositiveOrNull
    clip_grad: _Positive


class _Engine(_Section):
    forward_only: Annotated[bool, _one_of(False, why="use trainer.val_only=true to evaluate only")]


class _Run(_Section):
    data: _Data
    model: _Model
    trainer: _Trainer
    engine: _Engine
    optim: _Optim

    @model_validator(mode="after")
    def _only_a_base_that_trains_has_a_learning_rate(self) -> Self:
        if self.optim.base_lr is not None and self.model.freeze_base_model:
            raise ConfigError("optim.base_lr has no meaning while model.freeze_base_model=true: leave it out")
        return self

    @model_validator(mode="after")
    def _states_are_kept_of_a_frozen_base(self) -> Self:
        if self.data.hidden_states_cache is not None and not self.model.freeze_base_model:
            raise ConfigError(
                "data.hidden_states_cache needs model.freeze_base_model=true: a base that trains has other hidden "
                "states after every step"
            )
        return self


class _FsdpEngine(_Engine):
    strategy: Annotated[str, _one_of("fsdp2", "fsdp", why="give engine=megatron optim=megatron to train on Megatron")]
    ulysses_sequence_parallel_size: _PositiveInt
    reshard_after_forward: Annotated[bool | str, _one_of(True, False, "auto")]
    param_dtype: Annotated[
        Literal["bf16", "bfloat16", "fp32", "float32"] | None, _must_be("bf16 or fp32", "float16 is not supported")
    ] = _at("mixed_precision", "param_dtype")


class _FsdpRun(_Run):
    engine: _FsdpEngine

    @model_validator(mode="after")
    def _ulysses_is_packed(self) -> Self:
        if self.engine.ulysses_sequence_parallel_size > 1 and not self.model.use_remove_padding:
            raise ConfigError("engine.ulysses_sequence_parallel_size above 1 needs model.use_remove_padding=true")
        return self


class _MegatronEngine(_Engine):
    strategy: Annotated[str, _one_of("megatron", why="leave it out")]
    tensor_model_parallel_size: _PositiveInt
    pipeline_model_parallel_size: _PositiveInt
    context_parallel_size: _PositiveInt
    sequence_parallel: _Bool
    use_distributed_optimizer: _Bool
    use_remove_padding: _Bool
    model_dtype: _NumberType
    dtype: Annotated[str, _one_of("bfloat16", why="set engine.model_dtype=bf16 or fp32 instead")]
    vanilla_mbridge: Annotated[bool | None, _one_of(None, True, False)]
    use_mbridge: Annotated[bool, _one_of(True, why="verl's Megatron engine reads the base model through a bridge")]
    use_megatron_fsdp: Annotated[bool, _one_of(False, why="give engine=fsdp optim=fsdp to shard the base model")]
    use_dist_checkpointing: Annotated[
        bool, _one_of(False, why="the base is read from its Hugging Face folder, and checkpoints are this package's")
    ]
    dynamic_context_parallel: Annotated[bool, _one_of(False, why="use a fixed engine.context_parallel_size")]
    expert_model_parallel_size: Annotated[int, _one_of(1, why="expert parallelism is not supported")]
    virtual_pipeline_model_parallel_size: Annotated[
        int | None, _one_of(None, 1, why="interleaved pipeline stages are not supported")
    ]
    qat: Annotated[bool, _one_of(False, why="quantization-aware training is not supported")] = _at("qat", "enable")
    router_replay: Annotated[str, _one_of("disabled", why="a replay needs the routes of a rollout")] = _at(
        "router_replay", "mode"
    )
    fp16: Annotated[bool | None, _one_of(None, False, why="float16 is not supported")] = _at(
        "override_transformer_config", "fp16"
    )
    first_layers: _PositiveIntOrNull = _at("override_transformer_config", "num_layers_in_first_pipeline_stage")
    last_layers: _PositiveIntOrNull = _at("override_transformer_config", "num_layers_in_last_pipeline_stage")
    override_ddp_config: Any = None


class _MegatronModel(_Model):
    mtp: Annotated[bool, _one_of(False, why="the base model trains without its multi-token prediction")] = _at(
        "mtp", "enable"
    )


class _MegatronOptim(_Optim):
    optimizer: Annotated[str, _one_of("adam", why="no other optimizer is supported with engine=megatron")]
    min_lr: _From0
    lr_warmup_init: _From0
    weight_decay: _From0
    lr_decay_style: Annotated[str, _one_of("constant", "linear", "cosine", "inverse-square-root", "WSD")]
    lr_decay_steps: _PositiveIntOrNull
    lr_wsd_decay_steps: _PositiveIntOrNull
    lr_warmup_steps_ratio: Annotated[
        float | None, Field(ge=0, lt=1), _must_be("null or a number from 0 on and below 1")
    ]
    # -1 and null both mean the ratio above.
    lr_warmup_steps: Any
    use_precision_aware_optimizer: Any
    override_optimizer_config: Any = None

    @model_validator(mode="after")
    def _schedule_is_possible(self) -> Self:
        for key in ("min_lr", "lr_warmup_init"):
            if getattr(self, key) > self.lr:
                raise ConfigError(f"optim.{key}={getattr(self, key)} must not be above optim.lr={self.lr}")
        if self.lr_decay_style == "WSD" and self.lr_wsd_decay_steps is None:
            raise ConfigError("optim.lr_decay_style=WSD needs optim.lr_wsd_decay_steps")
        return self


class _MegatronData(_Data):
    hidden_states_cache: Annotated[
        None, _one_of(None, why="hidden states are kept with engine=fsdp optim=fsdp; what it writes, it reads")
    ]


class _MegatronRun(_Run):
    data: _MegatronData
    model: _MegatronModel
    engine: _MegatronEngine
    optim: _MegatronOptim

    @model_validator(mode="after")
    def _base_can_train_so(self) -> Self:
        engine, optim = self.engine, self.optim
        # verl overwrites the engine's setting with the model's: one that differs would not be heard.
        if engine.use_remove_padding is not self.model.use_remove_padding:
            raise ConfigError(
                "engine.use_remove_padding follows model.use_remove_padding: set model.use_remove_padding="
                f"{str(engine.use_remove_padding).lower()} instead"
            )
        if not self.model.freeze_base_model and engine.context_parallel_size > 1:
            raise ConfigError(
                f"engine.context_parallel_size={engine.context_parallel_size} must be 1 in joint training: "
                "context parallelism needs model.freeze_base_model=true"
            )
        # A frozen base has neither gradients nor an optimizer.
        joint_only = {
            "optim.use_precision_aware_optimizer": optim.use_precision_aware_optimizer,
            "optim.override_optimizer_config": optim.override_optimizer_config,
            "engine.override_ddp_config": engine.override_ddp_config,
        }
        for key, value in joint_only.items():
            if value and self.model.freeze_base_model:
                raise ConfigError(
                    f"{key} is a setting for training the base model, and model.freeze_base_model=true: leave it out, "
                    "or train jointly with model.freeze_base_model=false"
                )
        return self

    @model_validator(mode="after")
    def _warming_up_ends(self) -> Self:
        """As Megatron's scheduler asserts, as far as it can be known before the data are read."""
        key, steps = "optim.lr_decay_steps", self.optim.lr_decay_steps
        if steps is None:
            key, steps = "trainer.total_training_steps", self.trainer.total_training_steps
        warmup = self.optim.lr_warmup_steps
        if steps is not None and warmup is not None and warmup >= steps:
            raise ConfigError(f"optim.lr_warmup_steps={warmup} must be less than {key}={steps}")
        return self


def _check_processes(config: DictConfig, world_size: int) -> None:
    sizes = model_parallel_sizes(config)
    product = math.prod(sizes.values())
    if world_size % product:
        # Those that are 1 have no part in it.
        factors = [f"{key}={size}" for key, size in sizes.items() if size > 1]
        result = f" = {product}" if len(factors) > 1 else ""
        raise ConfigError(f"{' x '.join(factors)}{result} must divide the {world_size} processes")
    shard_size = config.model.speculator_shard_size
    if shard_size is not None and world_size % shard_size:
        raise ConfigError(f"model.speculator_shard_size={shard_size} must divide the {world_size} processes")
    data, ranks = config.data, world_size // product
    rows, rest = divmod(data.train_batch_size, ranks)
    if rest:
        raise ConfigError(
            f"data.train_batch_size={data.train_batch_size} must be divisible by the {ranks} data-parallel ranks"
        )
    if not data.use_dynamic_bsz and rows % data.micro_batch_size_per_gpu:
        raise ConfigError(
            f"data.train_batch_size={data.train_batch_size} gives {rows} rows a rank, which "
            f"data.micro_batch_size_per_gpu={data.micro_batch_size_per_gpu} must divide when data.use_dynamic_bsz=false"
        )
