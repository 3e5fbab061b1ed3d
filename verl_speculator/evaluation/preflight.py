"""Everything about an evaluation that can be known to be wrong before a model, or transformers, is loaded."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from verl_speculator.base_model.files import check_base_files, is_hub_name
from verl_speculator.data.chats import check_chat_file
from verl_speculator.errors import CheckpointError, ConfigError, DataError, MissingFileError, naming
from verl_speculator.evaluation.settings import EvaluationInput, EvaluationSettings
from verl_speculator.scorer.answers import check_answers

if TYPE_CHECKING:
    from verl_speculator.models import SpeculatorConfig


def check_input(given: EvaluationInput, settings: EvaluationSettings) -> None:
    """Raise a `SpeculatorError` with one sentence for the first thing that cannot work.

    Cheapest first: a mistyped path is answered before torch is loaded.
    """
    for name in given.speculators:
        if not Path(name).is_dir() and not is_hub_name(name):
            raise MissingFileError(f"--speculator: there is no folder {name!r}; a speculator folder is needed")
    if given.chat_template is not None and not given.chat_template.is_file():
        raise MissingFileError(f"--chat-template: there is no file {str(given.chat_template)!r}")
    if settings.revision is not None and Path(given.base).exists():
        raise ConfigError("--revision belongs to a name on the Hugging Face hub, and --base is a folder: leave it out")
    for file in given.data:
        if "://" in file:
            raise DataError(f"--data: {file!r} is a remote file: download it first")
        check_chat_file(file, settings.messages_key, "--data", column_key="--messages-key")
    sizes = check_base_files(
        given.base, key="--base", template_key="--chat-template FILE", has_template=given.chat_template is not None
    )
    read_speculator_configs(given, settings, None if sizes is None else (sizes.hidden_size, sizes.vocab_size))
    if settings.answers is not None:
        for file in given.data:
            check_answers(file, settings.answers)
    if settings.accept:
        # Last, because transformers comes with it.
        from verl_speculator.scorer.rule import check_rule

        with naming("--accept"):
            for text in settings.accept:
                check_rule(text)


@functools.cache
def speculator_folder(name: str) -> Path:
    """The folder with a speculator's files; of a name on the Hugging Face hub, the one that they are downloaded to.

    Raises:
        MissingFileError: Neither holds a speculator.
    """
    from verl_speculator.models.serialization import find_folder
    from verl_speculator.serving.recognition import find_speculator

    if Path(name).is_dir():
        return find_folder(name)
    found = find_speculator(name)
    if found is None:
        raise MissingFileError(
            f"{name!r} is no folder, and the Hugging Face hub has no speculator of that name or cannot be reached"
        )
    return found.folder()


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


def read_speculator_configs(
    given: EvaluationInput, settings: EvaluationSettings, sizes: tuple[int, int] | None
) -> list[SpeculatorConfig]:
    """The configurations of the speculators, whose weights are there too.

    Args:
        sizes: The base's hidden size and rows of `lm_head`, which the speculators must have been trained for; None
            where they are not known yet.

    Raises:
        SpeculatorError: A speculator is not there, not usable, or has fewer heads than are asked for; the message
            begins with the flag.
    """
    # Here, because torch comes with them.
    from verl_speculator.models import SpeculatorConfig
    from verl_speculator.models.serialization import CONFIG_NAME, find_weights, read_config

    configs = []
    for path in given.speculators:
        with naming("--speculator"):
            folder = speculator_folder(path)
            find_weights(folder)
            file = folder / CONFIG_NAME
            values = read_config(file)
            try:
                config = SpeculatorConfig.from_dict(values)
            except ConfigError as error:
                raise CheckpointError(f"{file} is not usable: {error}") from error
        if (most := max(settings.num_draft_tokens, default=0)) > config.n_predict:
            raise ConfigError(
                f"--num-draft-tokens={most} is more than the n_predict={config.n_predict} "
                f"of the speculator in {path!r}: lower it"
            )
        if sizes is not None:
            config.check_fits_base(*sizes, f"--speculator: the speculator in {path!r}")
        configs.append(config)
    return configs
