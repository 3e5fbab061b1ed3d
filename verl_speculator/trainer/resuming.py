"""Whether a run may go on from a checkpoint: it must be the run that wrote it, as far as what is learned is concerned.

A checkpoint records its run's settings (`run_config.yaml`), and fingerprints of its base model and of its data
(`resume/origin.json`). How the work is cut (processes, micro-batches, number types), how long it lasts and what is
logged or saved may change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_speculator.base_model.files import fingerprint_base, fingerprint_files
from verl_speculator.checkpoint.layout import RESUME_FOLDER, RUN_CONFIG_FILE
from verl_speculator.data.chats import resolve_files
from verl_speculator.errors import ConfigError
from verl_speculator.trainer.config.compose import engine_name
from verl_speculator.trainer.config.rules import model_parallel_sizes

ORIGIN_FILE = f"{RESUME_FOLDER}/origin.json"

_BASE, _DATA = "model.path", "data.train_files"
_AFRESH = "start afresh with another trainer.default_local_dir or trainer.resume_mode=disable"

# What decides which tokens a row has, beside the chat template.
ROW_KEYS = (
    "data.max_length",
    "data.truncation",
    "data.train_max_samples",
    "data.messages_key",
    "data.tools_key",
    "data.enable_thinking_key",
    "data.enable_thinking_default",
    "data.apply_chat_template_kwargs",
    "data.ignore_input_ids_mismatch",
    "data.custom_cls",
    "data.shuffle",
    "data.seed",
)
# Settings that change what is learned, and sections of which every key does.
_SECTIONS = ("model.speculator", "optim")
_MODEL_KEYS = (
    "model.speculator_path",
    "model.speculator_adapter",
    "model.speculator",
    "model.speculator_loss_coeff",
    "model.freeze_base_model",
    "model.detach_hidden_states",
    "model.custom_chat_template",
)
_TRAINING_KEYS = ("optim", "data.train_batch_size", *ROW_KEYS, "trainer.seed")
# Written by verl's trainer, and longer when a run is to train longer.
_LENGTHS = ("optim.total_training_steps",)

_ABSENT = object()


def describe_origin(config: DictConfig) -> dict[str, list[dict[str, str | None]]]:
    """What a run learns from: name and fingerprint of the base model and of each file of data, as JSON can hold it.

    A fingerprint is None where there is nothing to read on this machine: a name on a hub, a remote path.
    """
    files = resolve_files(config.data.train_files, _DATA)
    return {
        _BASE: [{"name": str(config.model.path), "fingerprint": fingerprint_base(str(config.model.path))}],
        _DATA: describe_files(files),
    }


def describe_files(files: Sequence[str]) -> list[dict[str, str | None]]:
    return [{"name": file, "fingerprint": fingerprint_files(Path(file))} for file in files]


def first_difference(
    items: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]
) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The first of `describe_origin`'s items that is another than before, and what it was; None if all are the same."""
    for item, was in zip_longest(items, before, fillvalue={"name": "nothing"}):
        marks = item.get("fingerprint"), was.get("fingerprint")
        # A folder may have moved: where both contents are known, they count.
        if (marks[0] != marks[1]) if all(marks) else (item["name"] != was["name"]):
            return item, was
    return None


def check_same_run(config: DictConfig, resume_from: Path) -> None:
    """Refuse to go on from a checkpoint of a run that learned something else.

    Raises:
        ConfigError: names the first difference and the ways out.
    """
    file = resume_from / RUN_CONFIG_FILE
    if not file.is_file():
        return
    before = DictConfig(OmegaConf.load(file))
    # In the order of what a user would want to hear of first.
    _check_same_engine(config, before, resume_from)
    _check_same_origin(config, before, resume_from)
    # To evaluate, the speculator has to be the same, and not the way in which it was trained.
    for key in _MODEL_KEYS if config.trainer.val_only else (*_MODEL_KEYS, *_TRAINING_KEYS):
        # What the old run did not have came with a later version, which gave it the meaning that it had before.
        was = OmegaConf.select(before, key, default=_ABSENT)
        section = {f"{key}.{name}": item for name, item in was.items()} if key in _SECTIONS else {key: was}
        for name, was in section.items():
            value = OmegaConf.select(config, name)
            # A width is the same as a number and as a string.
            if was is not _ABSENT and name not in _LENGTHS and str(value) != str(was):
                raise ConfigError(
                    f"{name}={_typed(value)}, but {resume_from} was trained with {_typed(was)}: give that to go on, "
                    f"or {_AFRESH}"
                )


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
        # The speculator's own state does not depend on how it was cut.
        return
    for key, size in model_parallel_sizes(config).items():
        size_before = OmegaConf.select(before, key)
        if size_before is not None and size_before != size:
            raise ConfigError(
                f"{key}={size}, but the base model's optimizer state in {resume_from} was cut with {size_before}: "
                f"give that to go on, or {_AFRESH}"
            )


def _check_same_origin(config: DictConfig, before: DictConfig, resume_from: Path) -> None:
    file = resume_from / ORIGIN_FILE
    if file.is_file():
        origin = json.loads(file.read_text())
    else:
        # An older checkpoint has the names only.
        files = resolve_files(OmegaConf.select(before, _DATA), _DATA)
        origin = {_BASE: [{"name": str(before.model.path)}], _DATA: [{"name": name} for name in files]}
    for key, items in describe_origin(config).items():
        if key == _DATA and config.trainer.val_only:
            continue
        difference = first_difference(items, origin[key])
        if difference is not None:
            item, was = difference
            has_changed = " as it was then" if item["name"] == was["name"] else ""
            raise ConfigError(
                f"{key}={item['name']}, but {resume_from} was trained with {was['name']}{has_changed}: "
                f"give that to go on, or {_AFRESH}"
            )


def _typed(value: Any) -> str:
    """As a user would give it."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
