"""vLLM's command line as vLLM reads it, without loading vLLM. Checked on 0.28.

vLLM takes `_` for `-` in a name, unambiguous beginnings of names, `--name=value`, and `--name.key value` for an entry
of a name's JSON. Dotted entries replace the whole JSON that stands elsewhere on the line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from verl_speculator.base_model.files import is_hub_name
from verl_speculator.errors import ConfigError, MissingFileError

HIDDEN = "***"
LOCALHOST = "127.0.0.1"
_SECRET = ("--api-key", "--hf-token", "--ssl-keyfile-password")


@dataclass
class Option:
    """`name` as vLLM knows it, `spelled` as the user wrote it, and what follows up to the next option."""

    name: str
    spelled: str
    values: list[str] = field(default_factory=list)

    def is_called(self, name: str, shortest: str) -> bool:
        """Whether it is the option `name`, or a beginning of it that has at least the letters of `shortest`."""
        return self.name.startswith(shortest) and name.startswith(self.name)


def is_option(argument: str) -> bool:
    return argument.startswith("-") and not argument[1:2].isdigit() and argument != "-"


def read_options(arguments: Sequence[str]) -> list[Option]:
    """The options of a command line, those of a file given with `--config` included.

    Raises:
        SpeculatorError: The file is not there, or not one of options.
    """
    options: list[Option] = []
    for argument in arguments:
        if is_option(argument):
            spelled, has_value, value = argument.partition("=")
            options.append(Option(_known_name(spelled), spelled, [value] if has_value else []))
        elif options:
            options[-1].values.append(argument)
    files = [value for option in options if option.name == "--config" for value in option.values]
    return options + [option for file in files for option in _read_config_file(Path(file))]


def _known_name(spelled: str) -> str:
    name = spelled.partition(".")[0]
    return "--" + name[2:].replace("_", "-") if name.startswith("--") else name


def _read_config_file(file: Path) -> list[Option]:
    import yaml

    if not file.is_file():
        raise MissingFileError(f"--config: there is no file {str(file)!r}")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {str(file)!r} is not readable YAML") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config: {str(file)!r} must hold options of vLLM, such as `port: 8000`")
    return [Option(_known_name(f"--{key}"), f"{key} in {file}", [str(value)]) for key, value in values.items()]


def split_base(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The base model among what is not an option of `serve`, and the rest of it.

    Which of its options take a value only vLLM knows, so the base is what comes first, what cannot be the value of an
    option, or else the only thing that can be a model.

    Raises:
        ConfigError: There is none, or it cannot be told which it is.
    """
    loose = [index for index, argument in enumerate(arguments) if not is_option(argument)]
    found = [
        index for index in loose if index == 0 or not is_option(arguments[index - 1]) or "=" in arguments[index - 1]
    ]
    if loose[:1] == [0]:
        found = [0]
    elif len(found) != 1:
        found = [index for index in found or loose if _can_be_a_base(arguments[index])]
    if len(found) != 1:
        # Not what it could be: that may be a key.
        what = "cannot be told from the values of options" if len(loose) > 1 else "is missing"
        raise ConfigError(f"BASE, the base model's folder or name, {what}: put it before them")
    return arguments[found[0]], [argument for index, argument in enumerate(arguments) if index != found[0]]


def _can_be_a_base(text: str) -> bool:
    return (Path(text) / "config.json").is_file() or is_hub_name(text)


def check_options(options: Sequence[Option]) -> None:
    """Refuse what would put another speculator, or another base, in the place of those that were checked."""
    for option in options:
        if option.name.startswith(("--speculative", "--spec-")) or option.is_called("--speculative-config", "--sp"):
            raise ConfigError(f"{option.spelled} is set by --speculator: leave it out.")
        if option.name in ("-s", "-sc"):
            raise ConfigError(f"{option.spelled} is vLLM's --speculative-config, set by --speculator: leave it out.")
        if option.name == "--model":
            raise ConfigError(f"{option.spelled} is set by BASE: leave it out.")


def values_of(options: Sequence[Option], name: str, shortest: str) -> list[str]:
    """What the option, or a beginning of its name, was given last; nothing where it is not among them."""
    given = [option.values for option in options if option.is_called(name, shortest)]
    return given[-1] if given else []


def take_api_key(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The one key that clients need, and the command line without it; None where there is none, or more than one."""
    keys, rest, is_key = [], [], False
    for argument in arguments:
        if is_option(argument):
            spelled, has_value, value = argument.partition("=")
            is_key = Option(_known_name(spelled), spelled).is_called("--api-key", "--api-k")
            keys += [value] if is_key and has_value else []
            rest += [] if is_key else [argument]
        elif is_key:
            keys.append(argument)
        else:
            rest.append(argument)
    return (keys[0], rest) if len(keys) == 1 else (None, list(arguments))


def without_secrets(command: Sequence[str]) -> list[str]:
    """The command fit to be shown: values of options that are nobody else's business are hidden."""
    shown, hide = [], False
    for argument in command:
        if is_option(argument):
            spelled, has_value, _ = argument.partition("=")
            name = _known_name(spelled)
            hide = any(secret.startswith(name) and len(name) > len("--a") for secret in _SECRET)
            shown.append(f"{spelled}={HIDDEN}" if hide and has_value else argument)
        else:
            shown.append(HIDDEN if hide else argument)
    return shown
