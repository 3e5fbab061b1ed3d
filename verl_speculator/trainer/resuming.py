"""Whether a run can go on from a checkpoint: what has to be as it was when the checkpoint was written."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from verl_speculator.checkpoint.layout import RUN_CONFIG_FILE
from verl_speculator.errors import ConfigError
from verl_speculator.trainer.config.compose import engine_name
from verl_speculator.trainer.config.rules import model_parallel_sizes

_AFRESH = "start afresh with trainer.resume_mode=disable or another trainer.default_local_dir"


def check_same_run(config: DictConfig, resume_from: Path) -> None:
    """Raise :class:`ConfigError` if the run that wrote the checkpoint had settings that this one cannot go on with."""
    file = resume_from / RUN_CONFIG_FILE
    if not file.is_file():
        return
    before = DictConfig(OmegaConf.load(file))
    _check_same_engine(config, before, resume_from)
    _check_same_shape(config, before, resume_from)


def _check_same_engine(config: DictConfig, before: DictConfig, resume_from: Path) -> None:
    if "engine" not in before:
        return
    engine, was = engine_name(config), engine_name(before)
    if engine != was:
        raise ConfigError(
            f"engine={engine} cannot go on from {resume_from}, whose optimizer and schedule are those of engine={was}: "
            f"start from its weights with model.speculator_path={resume_from} and another trainer.default_local_dir"
        )
    if engine != "megatron" or config.model.freeze_base_model:
        return
    for key, size in model_parallel_sizes(config).items():
        size_before = OmegaConf.select(before, key)
        if size_before is not None and size_before != size:
            raise ConfigError(
                f"{key}={size}, but the base model's optimizer state in {resume_from} was cut with {size_before}: "
                f"give that to go on, or {_AFRESH}"
            )


def _check_same_shape(config: DictConfig, before: DictConfig, resume_from: Path) -> None:
    if config.model.speculator_path is not None or OmegaConf.select(before, "model.speculator_path") is not None:
        return
    for key, value in config.model.speculator.items():
        was = OmegaConf.select(before, f"model.speculator.{key}")
        # An adapter's setting may be new, and a width is the same as a number and as a string.
        if was is not None and str(was) != str(value):
            raise ConfigError(
                f"model.speculator.{key}={value}, but {resume_from} was trained with {was}: give that to go on, "
                f"or {_AFRESH}"
            )
