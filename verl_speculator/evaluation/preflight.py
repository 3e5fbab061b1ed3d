"""Everything about an evaluation that can be known to be wrong before a model, or transformers, is loaded."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from verl_speculator.data.chat_parquet import check_chat_file
from verl_speculator.errors import ConfigError, DataError, MissingFileError, SpeculatorError
from verl_speculator.evaluation.settings import EvaluationInput, EvaluationSettings

if TYPE_CHECKING:
    from verl_speculator.models import SpeculatorConfig
    from verl_speculator.trainer.base_model import BaseSizes

# What the trainer's checks call by a configuration key is a flag here.
_FLAGS = {
    "model.path": "--base",
    "model.custom_chat_template": "--chat-template FILE",
    "data.messages_key": "--messages-key",
}


def check_input(given: EvaluationInput, settings: EvaluationSettings) -> None:
    """Raise a :class:`SpeculatorError` with one sentence for the first thing that cannot work.

    Cheapest first: a mistyped path is answered before torch is loaded.
    """
    for path in given.speculators:
        if not path.is_dir():
            raise MissingFileError(f"--speculator: there is no folder {str(path)!r}; a speculator folder is needed")
    if given.chat_template is not None and not given.chat_template.is_file():
        raise MissingFileError(f"--chat-template: there is no file {str(given.chat_template)!r}")
    _check_data(given, settings)
    sizes = _check_base(given)
    _check_speculators(given, settings, sizes)


def check_report_folder(folder: Path) -> None:
    """Make the folder for the report, and find out whether files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"--report: cannot write to {str(folder)!r} ({error.strerror}); give a folder in which files can be made"
        ) from error


def check_draft_tokens(config: SpeculatorConfig, num_draft_tokens: int | None, path: Path) -> None:
    if num_draft_tokens is not None and num_draft_tokens > config.n_predict:
        raise ConfigError(
            f"--num-draft-tokens={num_draft_tokens} is more than the n_predict={config.n_predict} "
            f"of the speculator in {str(path)!r}: lower it"
        )


def _check_data(given: EvaluationInput, settings: EvaluationSettings) -> None:
    for file in given.data:
        if "://" in file:
            raise DataError(f"--data: {file!r} is a remote file: download it first")
        with _FlagNames():
            check_chat_file(file, settings.messages_key, "--data")


def _check_base(given: EvaluationInput) -> BaseSizes | None:
    from omegaconf import OmegaConf

    from verl_speculator.trainer.base_model import check_base_model

    template = None if given.chat_template is None else str(given.chat_template)
    model = OmegaConf.create({"path": given.base, "tokenizer_path": None, "custom_chat_template": template})
    with _FlagNames():
        return check_base_model(model)


def _check_speculators(given: EvaluationInput, settings: EvaluationSettings, sizes: BaseSizes | None) -> None:
    from verl_speculator.evaluation.speculator_files import check_fits, read_speculator_config

    for path in given.speculators:
        config = read_speculator_config(path)
        check_draft_tokens(config, settings.num_draft_tokens, path)
        if sizes is not None:
            check_fits(config, sizes.hidden_size, sizes.vocab_size, path)


class _FlagNames:
    """Inside it, errors that name configuration keys name flags instead."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, SpeculatorError):
            return
        message = str(error)
        for key, name in _FLAGS.items():
            message = message.replace(key, name)
        raise type(error)(message) from error
