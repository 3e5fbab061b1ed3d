"""The configuration of a scorer's training: ours on verl's `ppo_trainer`, a file, the command line; and its checks.

Everything that can be wrong is answered before verl or a model is loaded.
"""

from __future__ import annotations

import ast
import copy
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from verl_speculator.errors import ConfigError, DataError, MissingFileError, nearest_name
from verl_speculator.scorer.config import ScoringModelConfig
from verl_speculator.scorer.settings import ROLLOUT_SECTION, RewardSettings, RolloutSettings
from verl_speculator.trainer.config.compose import (
    KnownKeys,
    config_dir,
    first_line,
    known_keys,
    parse_override,
    quoted,
    verl_config_dir,
)

CONFIG_NAME = "spd_train_config"
_ACTOR = "actor_rollout_ref"
# Short for the section of the same name in verl's, and the keys of the model that stand alone.
_SECTIONS = ("actor", "ref", "rollout", "model")
_MODEL_KEYS = ("lora_rank", "lora_alpha", "target_modules")
# Where verl once had them, or has them under another name.
_OLD_NAMES = {
    "reward_model.reward_manager": "reward.reward_manager.name",
    "custom_reward_function.path": "reward.custom_reward_function.path",
    "custom_reward_function.name": "reward.custom_reward_function.name",
}
_OLD_SECTIONS = ("reward_model", "custom_reward_function", "sandbox_fusion")
_REWARD_MANAGER = "spd"
# Any key may be right in these; what reads them checks it.
_OPEN_SECTIONS = (
    f"{_ACTOR}.model.scorer",
    f"{_ACTOR}.model.override_config",
    f"{_ACTOR}.model.quantization",
    f"{_ACTOR}.actor.optim.override_optimizer_config",
    "reward.custom_reward_function.reward_kwargs",
    "ray_kwargs.ray_init",
)
# Of verl's rollout section the training of a scorer reads these; the others are of a server that it does not have.
_ROLLOUT_KEYS = ("name", "nnodes", "n", "temperature", "seed", "val_kwargs", "custom", "calculate_log_probs", "agent")
# Ray's workers may stand elsewhere.
_PATHS = (
    "data.train_files",
    "data.val_files",
    f"{ROLLOUT_SECTION}.target_model_path",
    f"{ROLLOUT_SECTION}.draft_model_path",
    f"{_ACTOR}.model.path",
    f"{_ACTOR}.model.scorer.path",
    "reward.custom_reward_function.path",
    "reward.reward_kwargs.step_reward_path",
    "trainer.resume_from_path",
)
_UNUSED_MODEL_KEYS = ("use_liger", "use_fused_kernels", "enable_activation_offload", "lora_adapter_path")
_ESTIMATORS = ("grpo", "grpo_passk", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "opo")


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The settings among a command line's arguments, and the file of `--config`."""
    settings, file = list(arguments), None
    while "--config" in settings:
        place = settings.index("--config")
        if place + 1 == len(settings):
            raise ConfigError("--config must be followed by a file of settings")
        file = settings[place + 1]
        del settings[place : place + 2]
    if unknown := [text for text in settings if text.startswith("-")]:
        raise ConfigError(f"{unknown[0]} is no option: there is --config FILE, and all else is key=value")
    return settings, file


def load_config(overrides: Sequence[str], file: str | None = None) -> DictConfig:
    """The configuration with a file's settings and then `key=value` overrides applied, and interpolations resolved.

    Raises:
        ConfigError: What does not parse, or a key that does not exist, with the nearest one that does.
        MissingFileError: There is no such file.
    """
    given = dict(_file_settings(file)) if file else {}
    for text in overrides:
        override = parse_override(text)
        if override.is_delete():
            raise ConfigError(f"{override.key_or_group} cannot be removed from the configuration: leave out {text!r}")
        given |= _leaves(override.key_or_group, override.value())
    config = copy.deepcopy(_defaults())
    known = known_keys(config)
    settings: dict[str, Any] = {}
    for key, value in given.items():
        full = _full_name(key, known)
        _check_key(key, full, known)
        if full in settings and settings[full] != value:
            raise ConfigError(f"{full} is given twice, as {settings[full]!r} and as {value!r}: give it once")
        settings[full] = value
    try:
        OmegaConf.set_struct(config, False)
        for key, value in settings.items():
            OmegaConf.update(config, key, value)
        if not config.data.train_files:
            raise ConfigError("data.train_files must name the windows that `verl-speculator scorer data` has written")
        manager = config.reward.reward_manager
        if manager.name == _REWARD_MANAGER:
            manager.name = "SPDRewardManager"
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error)) from error
    _note_without_effect(settings)
    _fill_in(config)
    return config


@functools.cache
def _defaults() -> DictConfig:
    search_path = "hydra.searchpath=[" + quoted(f"file://{verl_config_dir()}") + "]"
    try:
        with initialize_config_dir(str(config_dir()), version_base=None):
            return compose(CONFIG_NAME, [search_path])
    except HydraException as error:
        raise ConfigError(first_line(error)) from error


def _file_settings(file: str) -> Iterator[tuple[str, Any]]:
    if not Path(file).is_file():
        raise MissingFileError(f"--config: there is no file {file!r}")
    try:
        values = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except Exception as error:
        # A YAML parser's errors share no type with OmegaConf's.
        raise ConfigError(f"--config: {file!r} is no YAML ({first_line(error)})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config: {file!r} holds no settings, key: value")
    values.pop("defaults", None)  # for Hydra; ours are taken in any case
    for key, value in values.items():
        yield from _leaves(str(key), value).items()


def _leaves(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {key: value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= _leaves(f"{key}.{name}", inner)
    return found


def _full_name(key: str, known: KnownKeys) -> str:
    """Where verl, or what is added to it, reads the setting of a short or old name."""
    key = _OLD_NAMES.get(key, key)
    section = key.partition(".")[0]
    if key in _MODEL_KEYS:
        key = f"{_ACTOR}.model.{key}"
    elif section in _SECTIONS:
        key = f"{_ACTOR}.{key}"
    inner = key.removeprefix(f"{_ACTOR}.rollout.")
    if inner != key and f"{ROLLOUT_SECTION}.{inner}" in known:
        return f"{ROLLOUT_SECTION}.{inner}"
    return key


def _check_key(given: str, full: str, known: KnownKeys) -> None:
    section = full.partition(".")[0]
    if section in _OLD_SECTIONS:
        raise ConfigError(f"{given} is an old name of verl's: write reward.{given}")
    if known.get(full) is False or full.startswith(tuple(f"{name}." for name in _OPEN_SECTIONS)):
        return
    if known.get(full):
        names = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == full]
        raise ConfigError(f"{given} is a section: set the keys in it, which are {', '.join(names)}")
    parent, _, name = full.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == parent}
    near = nearest_name(name, siblings)
    meant = siblings[near] if near else nearest_name(full, known) or _of_that_name(name, known)
    raise ConfigError(f"{given} is not a configuration key" + (f"; did you mean {meant}?" if meant else ""))


def _of_that_name(name: str, known: KnownKeys) -> str | None:
    ours_first = sorted(known, key=lambda key: not key.startswith(ROLLOUT_SECTION))
    by_name = {key.rpartition(".")[2]: key for key in reversed(ours_first) if not known[key]}
    near = nearest_name(name, by_name, cutoff=0.8)
    return by_name[near] if near else None


def _note_without_effect(settings: Mapping[str, Any]) -> None:
    start = f"{_ACTOR}.rollout."
    idle = [
        key
        for key in settings
        if key.startswith(start)
        and not key.removeprefix(start).startswith("log_prob_")
        and key.removeprefix(start).partition(".")[0] not in _ROLLOUT_KEYS
    ]
    if idle:
        print(f"Without effect, since the scorer rolls out itself and needs no rollout server: {', '.join(idle)}")


def _fill_in(config: DictConfig) -> None:
    """What follows from the machine."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    on_cpu = accelerator is None or accelerator.type not in ("cuda", "npu")
    with open_dict(config):
        trainer = config.trainer
        trainer.device = trainer.device or ("cpu" if accelerator is None or on_cpu else accelerator.type)
        if trainer.n_gpus_per_node is None:
            trainer.n_gpus_per_node = 1 if on_cpu else torch.accelerator.device_count()
        for key in _PATHS:
            value = OmegaConf.select(config, key)
            if value is not None:
                OmegaConf.update(
                    config, key, [*map(_absolute, value)] if OmegaConf.is_list(value) else _absolute(value)
                )
        trainer.default_local_dir = os.path.abspath(os.path.expanduser(trainer.default_local_dir))
        if on_cpu and "RAY_ADDRESS" not in os.environ:
            # verl asks for a GPU a worker; its other processes count as a CPU each, and mostly wait.
            ray_init = config.ray_kwargs.ray_init
            ray_init.num_gpus = trainer.n_gpus_per_node
            ray_init.num_cpus = ray_init.num_cpus or max(os.cpu_count() or 1, trainer.n_gpus_per_node + 8)


def _absolute(path: str) -> str:
    # What is not there may be a name on the hub, or of a module.
    expanded = os.path.expanduser(path)
    return os.path.abspath(expanded) if os.path.exists(expanded) else path


def check_run(config: DictConfig) -> None:
    """Look at everything that can be wrong before a process is started.

    Raises:
        SpeculatorError: One sentence about the first thing that cannot work.
    """
    rollout, _ = RolloutSettings.of(config.actor_rollout_ref), RewardSettings.of(config)
    _check_values(config)
    _check_scorer(config)
    files = [file for key in ("train_files", "val_files") for file in _as_list(config.data[key])]
    for file in files:
        _check_windows(file)
    _check_models(rollout)
    for section, path, name in (
        ("reward.custom_reward_function", *_function(config.reward.custom_reward_function)),
        (
            "reward.reward_kwargs.step_reward",
            config.reward.reward_kwargs.step_reward_path,
            config.reward.reward_kwargs.step_reward_name,
        ),
    ):
        if path and not str(path).startswith("pkg://"):
            _check_function(section, path, name)


def _check_values(config: DictConfig) -> None:
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    estimator = config.algorithm.adv_estimator
    if estimator not in _ESTIMATORS:
        raise ConfigError(f"algorithm.adv_estimator={estimator} must be one without a critic: {', '.join(_ESTIMATORS)}")
    if rollout.n < 2:
        raise ConfigError(
            f"rollout.n={rollout.n} must be at least 2: a sample is judged against the others of its group"
        )
    if rollout.name != _REWARD_MANAGER:
        raise ConfigError(f"rollout.name={rollout.name} must be spd: the scorer rolls out itself")
    if actor.strategy not in ("fsdp", "fsdp2"):
        raise ConfigError(f"actor.strategy={actor.strategy} must be fsdp2: other engines cannot train a scorer")
    if actor.fsdp_config.param_offload or actor.fsdp_config.optimizer_offload:
        raise ConfigError("actor.fsdp_config.param_offload and optimizer_offload must be false: the target decodes")
    if actor.ulysses_sequence_parallel_size > 1:
        raise ConfigError("actor.ulysses_sequence_parallel_size must be 1 for a scorer")
    for key in _UNUSED_MODEL_KEYS:
        if config.actor_rollout_ref.model[key]:
            raise ConfigError(f"model.{key} is not for a scorer, whose target is frozen: leave it out")
    if config.actor_rollout_ref.model.quantization and config.trainer.device == "cpu":
        raise ConfigError("model.quantization is for accelerators: on a CPU leave it out")
    if config.data.train_batch_size % actor.ppo_mini_batch_size:
        raise ConfigError(
            f"actor.ppo_mini_batch_size={actor.ppo_mini_batch_size} must divide "
            f"data.train_batch_size={config.data.train_batch_size}"
        )
    if rollout.temperature <= 0:
        raise ConfigError(f"rollout.temperature={rollout.temperature} must be above 0: actions are drawn")


def _check_scorer(config: DictConfig) -> None:
    model = config.actor_rollout_ref.model
    values: dict[str, Any] = {**model.scorer}
    path = values.pop("path", None)
    ScoringModelConfig.from_dict(
        {"hidden_size": 1, "lora_rank": model.lora_rank, "lora_alpha": model.lora_alpha, **values}
    )
    if path is not None:
        from verl_speculator.scorer.model import read_config

        saved = read_config(path)
        if saved.lora_rank != model.lora_rank:
            raise ConfigError(
                f"model.scorer.path: the scorer in {path!r} has lora_rank {saved.lora_rank}, and the run has "
                f"lora_rank={model.lora_rank}"
            )


def _check_windows(file: str) -> None:
    if not Path(file).is_file():
        raise MissingFileError(f"data: there is no file {file!r}; `verl-speculator scorer data` writes windows")
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"data: {file!r} is no parquet file ({first_line(error)})") from error
    if b"scalars" not in (schema.metadata or {}):
        raise DataError(f"data: {file!r} holds no windows; `verl-speculator scorer data` writes them")


def _check_models(settings: RolloutSettings) -> None:
    for key in ("target_model_path", "draft_model_path"):
        path = getattr(settings, key)
        if path and path.startswith(("/", ".", "~")) and not Path(path).expanduser().is_dir():
            raise MissingFileError(f"rollout.{key}: there is no folder {path!r}")
    target, draft = settings.target_model_path, settings.draft_model_path
    # A speculator's folder has no tokenizer, since it drafts the target's tokens.
    if draft and (Path(draft) / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        vocabularies = [AutoTokenizer.from_pretrained(path).get_vocab() for path in (target, draft)]
        if vocabularies[0] != vocabularies[1]:
            token = next(iter(dict(vocabularies[0].items() ^ vocabularies[1].items())))
            raise ConfigError(
                f"rollout.draft_model_path: the tokenizer of {draft!r} is not that of the target {target!r}; "
                f"they differ in {token!r}"
            )


def _check_function(section: str, path: str, name: str | None) -> None:
    if not Path(path).is_file():
        raise MissingFileError(f"{section}: there is no file {path!r}")
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise ConfigError(f"{section}: {path!r} is no Python ({error})") from error
    names = {one.name for one in tree.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)}
    imported = any(isinstance(one, ast.Import | ast.ImportFrom | ast.Assign) for one in tree.body)
    if name not in names and not imported:
        raise ConfigError(f"{section}: {path!r} has no function {name!r}; it has {', '.join(sorted(names)) or 'none'}")


def _function(section: Any) -> tuple[str | None, str | None]:
    return section.path, section.name


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
