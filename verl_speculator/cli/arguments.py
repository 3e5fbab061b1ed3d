"""Flags that commands share, so that they are called and mean the same everywhere."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from verl_speculator.base_model.settings import DEVICE_MAPS, DTYPES
from verl_speculator.errors import ConfigError
from verl_speculator.evaluation.settings import EvaluationSettings

_DEFAULTS = EvaluationSettings()


def add_data_arguments(group: Any, *, limit: int | None) -> None:
    """What is decoded by which base."""
    group.add_argument("--base", required=True, metavar="BASE", help="base model: a Hugging Face folder or name")
    group.add_argument(
        "--data", required=True, action="append", metavar="FILE.parquet", help="chats; repeat for several files"
    )
    group.add_argument("--messages-key", default=_DEFAULTS.messages_key, help="column of chats (default: %(default)s)")
    group.add_argument(
        "--limit",
        "--num-prompts",
        dest="num_prompts",
        type=int,
        default=limit,
        metavar="N",
        help=f"the first N chats only (default: {limit or 'all'})",
    )
    group.add_argument("--chat-template", type=Path, metavar="FILE", help="Jinja file to use instead of the base's own")


def add_request_arguments(group: Any) -> None:
    """How a server is loaded."""
    group.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="requests at a time (1 4 16)"
    )
    group.add_argument("--requests", type=int, default=64, help="for each number of them at a time (%(default)s)")
    group.add_argument("--max-tokens", type=int, default=128, help="of an answer (%(default)s)")


def check_request_arguments(args: argparse.Namespace) -> None:
    for name, value in (("concurrency", min(args.concurrency)), ("requests", args.requests)):
        if value < 1:
            raise ConfigError(f"--{name} must be at least 1, got {value}")
    if args.max_tokens < 2:
        raise ConfigError(
            f"--max-tokens must be at least 2, so that there is a time between tokens; got {args.max_tokens}"
        )


def add_import_argument(group: Any) -> None:
    group.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FILE_OR_MODULE",
        help="what registers a speculator type of your own; repeat for several",
    )


def require_training() -> None:
    """Raise `ConfigError` where the package was installed without what trains, as in an image that only serves."""
    missing = [name for name in ("verl", "hydra", "omegaconf", "torchdata", "datasets") if find_spec(name) is None]
    if missing:
        raise ConfigError(f'training needs {missing[0]}, which is not installed: pip install "verl_speculator[train]"')


def import_all(names: Sequence[str]) -> None:
    """Run files and modules of the user's for the speculator types that they register."""
    for name in names:
        from verl_speculator.models.importing import import_code

        import_code(name, "--import")


def add_decoding_arguments(group: Any, *, max_new_tokens: int, batch_size: int | None) -> None:
    group.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help="of an answer (default: %(default)s)")
    group.add_argument(
        "--batch-size",
        type=int,
        default=batch_size,
        help=f"prompts at once (default: {batch_size or 'what the engine has use for'})",
    )
    group.add_argument(
        "--temperature", type=float, default=_DEFAULTS.temperature, help="0 is greedy (default: %(default)s)"
    )
    group.add_argument("--top-p", type=float, default=_DEFAULTS.top_p, help="default: %(default)s")
    group.add_argument("--top-k", type=int, default=_DEFAULTS.top_k, help="0 is off (default: %(default)s)")
    group.add_argument("--seed", type=int, default=_DEFAULTS.seed, help="of sampling (default: %(default)s)")


def add_load_arguments(group: Any) -> None:
    """The flags of `LoadSettings`, for every command that decodes."""
    group.add_argument(
        "--dtype", choices=DTYPES, default=_DEFAULTS.dtype, help="auto: float32 on a CPU, else the base's own"
    )
    group.add_argument(
        "--device", default=_DEFAULTS.device, help="such as cpu or cuda:0 (default: an accelerator if any)"
    )
    group.add_argument(
        "--device-map",
        choices=DEVICE_MAPS,
        help="spread the base's layers over all accelerators (default: only if it does not fit on one)",
    )
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a base on the hub")
    group.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the base")
    group.add_argument(
        "--attn-implementation",
        metavar="NAME",
        help="such as eager, sdpa or flash_attention_2 (default: transformers')",
    )
    group.add_argument(
        "--quantization",
        metavar="JSON",
        help='transformers\' quantization_config, such as {"quant_method": "bitsandbytes", "load_in_4bit": true}; on '
        "accelerators",
    )


def settings_of(args: argparse.Namespace) -> EvaluationSettings:
    """Of a command whose flags have the names of its fields."""
    values = {name: getattr(args, name) for name in EvaluationSettings.__dataclass_fields__ if hasattr(args, name)}
    for name in ("num_draft_tokens", "accept"):
        values[name] = tuple(values.get(name) or ())
    return EvaluationSettings(**values)


def add_subcommands(parser: argparse.ArgumentParser, commands: Mapping[str, Any], dest: str) -> None:
    """Give a command subcommands: modules with `PURPOSE`, `DESCRIPTION`, `add_arguments` and `run`.

    The chosen one's `run` is then `args.run_subcommand`.
    """
    subparsers = parser.add_subparsers(dest=dest, metavar="COMMAND", required=True)
    for name, module in commands.items():
        command = subparsers.add_parser(
            name,
            help=module.PURPOSE,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run_subcommand=module.run)
        module.add_arguments(command)
