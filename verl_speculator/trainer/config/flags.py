"""Options of the command for what a run sets most, each another name of one `key=value`.

The options that all algorithms share are listed here. An algorithm's own are those that its configuration class
declares, so a new algorithm has its options without a word here.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from verl_speculator.errors import ConfigError

if TYPE_CHECKING:
    from verl_speculator.adapters.settings import Setting

_DEFAULT_TYPE = "lstm"
_TYPE_KEY = "model.speculator_type"
_ADAPTER_KEY = "model.speculator_adapter"
# Where a namespace keeps what an option was given for a key.
_DEST = "setting:"
# What Hydra reads as the text that it is.
_PLAIN_TEXT = re.compile(r"[A-Za-z~./_][\w~./-]*")


class _Common(NamedTuple):
    flag: str
    key: str
    metavar: str
    help: str


# Where vLLM's Speculators has the same thing, its name.
_COMMON = (
    _Common("--verifier-name-or-path", "model.partial_pretrain", "BASE", "base model: a Hugging Face folder or name"),
    _Common("--data-path", "data.train_files", "FILE.parquet", "chats to train on; repeat for several files"),
    _Common("--val-data-path", "data.val_files", "FILE.parquet", "chats to validate on, likewise"),
    _Common("--save-path", "trainer.default_local_dir", "FOLDER", "where checkpoints go"),
    _Common("--from-pretrained", "model.speculator_path", "FOLDER", "start from a trained speculator"),
    _Common("--epochs", "trainer.total_epochs", "N", "passes over the data"),
    _Common("--max-steps", "trainer.total_training_steps", "N", "stop after so many steps instead"),
    _Common("--lr", "optim.lr", "LR", "learning rate"),
    _Common("--batch-size", "data.train_batch_size", "N", "rows of a step, over all processes"),
    _Common("--max-length", "data.max_length", "N", "tokens of a row; what is longer is cut"),
    _Common("--total-seq-len", "data.max_token_len_per_gpu", "N", "tokens of a packed micro-batch"),
    _Common("--checkpoint-freq", "trainer.save_freq", "N", "steps between checkpoints, or after_each_epoch"),
    _Common("--val-freq", "trainer.test_freq", "N", "steps between validations, or after_each_epoch"),
)
_FILES = ("data.train_files", "data.val_files")


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options of every speculator, other names of settings")
    group.add_argument(
        "--speculator-type", metavar="TYPE", help="lstm (default), mlp, eagle3 or any other that is registered"
    )
    group.add_argument(
        "--import",
        dest="imported",
        metavar="FILE_OR_MODULE",
        help="what registers the type, if it is neither ours nor an installed package's",
    )
    for flag, key, metavar, text in _COMMON:
        action = "append" if key in _FILES else "store"
        group.add_argument(flag, dest=_DEST + key, action=action, metavar=metavar, help=f"{text} ({key})")
    group.add_argument("--engine", choices=("fsdp", "megatron"), help="what runs the base (engine and optim)")


def add_own_flags(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Add the options of the algorithm that `arguments` choose.

    An algorithm is looked up only where a type or an option of no other kind is given, for that loads torch.

    Raises:
        ConfigError: There is no such algorithm, what is imported fails, or an option of its is one of every run's.
    """
    choice = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    choice.add_argument("--speculator-type")
    choice.add_argument("--import", dest="imported")
    chosen, rest = choice.parse_known_args(arguments)
    name = chosen.speculator_type
    for text in rest:
        name = text.partition("=")[2] if text.startswith(f"{_TYPE_KEY}=") else name
    known = parser._option_string_actions
    options = [text.partition("=")[0] for text in rest if text.startswith("--")]
    if name is None and all(option in known for option in options):
        return
    from verl_speculator.adapters.settings import SHARED_DEFAULTS, declared_settings
    from verl_speculator.models import Speculator
    from verl_speculator.models.importing import import_code
    from verl_speculator.models.speculator import config_class_of

    if chosen.imported is not None:
        import_code(chosen.imported, "--import")
    name = name or _DEFAULT_TYPE
    config_class = config_class_of(Speculator.get_class(name))
    group = parser.add_argument_group(f"options of {name}")
    for setting in declared_settings(config_class):
        flag = "--" + setting.name.replace("_", "-")
        if flag in known:
            raise ConfigError(f"speculator {name!r}: {flag} is an option of every run, so rename {setting.name}.")
        plus = "" if setting.name in SHARED_DEFAULTS else "+"
        _add_flag(group, flag, f"{_DEST}{plus}model.speculator.{setting.name}", setting)


def _add_flag(group: Any, flag: str, dest: str, setting: Setting) -> None:
    """What a value may be is the algorithm's to check; here only how it is written depends on its type."""
    default = "" if setting.default in (None, dataclasses.MISSING) else f" (default: {setting.default})"
    options: dict[str, Any] = {"help": setting.help.replace("%", "%%") + default}
    is_union = typing.get_origin(setting.annotation) in (types.UnionType, typing.Union)
    kinds = typing.get_args(setting.annotation) if is_union else (setting.annotation,)
    kind, *others = (kind for kind in kinds if kind is not types.NoneType)
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["metavar"] = setting.name.rpartition("_")[2].upper()
        if typing.get_origin(kind) is list:
            options |= {"nargs": "+", "type": typing.get_args(kind)[0]}
        elif kind is str and not others:
            options["type"] = _text
    group.add_argument(flag, dest=dest, **options)


def flag_overrides(args: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """All that a command line sets, as `key=value`: its options first, then what it gives in that form.

    Raises:
        ConfigError: A setting that is given both ways.
    """
    found: dict[str, Any] = {}
    if args.speculator_type is not None:
        found[_TYPE_KEY] = args.speculator_type
    if args.engine is not None:
        found |= {"engine": args.engine, "optim": args.engine}
    if args.imported is not None:
        name = args.speculator_type or _DEFAULT_TYPE
        found[_ADAPTER_KEY] = "{path: " + _text(args.imported) + ", name: " + name + "}"
    keys = [name for name, value in vars(args).items() if name.startswith(_DEST) and value is not None]
    found |= {name.removeprefix(_DEST): _written(name.removeprefix(_DEST), getattr(args, name)) for name in keys}
    given = {text.lstrip("+").partition("=")[0] for text in overrides}
    for key in found:
        if key.lstrip("+") in given:
            raise ConfigError(f"{key.lstrip('+')} is given twice, by an option and as key=value: leave one of them out")
    return [*(f"{key}={value}" for key, value in found.items()), *overrides]


def _written(key: str, value: Any) -> str:
    """A value in Hydra's grammar; what a user typed stays as it was typed."""
    if isinstance(value, bool):
        return str(value).lower()
    if key in _FILES and len(value) == 1:
        return _text(value[0])
    if isinstance(value, list):
        return "[" + ",".join(_text(item) if key in _FILES else str(item) for item in value) + "]"
    is_path = key in ("model.partial_pretrain", "trainer.default_local_dir", "model.speculator_path")
    return _text(value) if is_path else str(value)


def _text(text: str) -> str:
    """A text in Hydra's grammar."""
    if _PLAIN_TEXT.fullmatch(text) and text.lower() not in ("null", "true", "false", "nan", "inf"):
        return text
    from verl_speculator.trainer.config.compose import quoted

    return quoted(text)
