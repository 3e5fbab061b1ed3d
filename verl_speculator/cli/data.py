"""`verl-speculator data ...`: what is done with data before a training, a module for each of its subcommands."""

from __future__ import annotations

import argparse

from verl_speculator.cli import data_hidden_states, data_prepare

PURPOSE = "prepare training data"
DESCRIPTION = "Prepare training data."
_COMMANDS = {"prepare": data_prepare, "hidden-states": data_hidden_states}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    for name, module in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.PURPOSE,
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run_data_command=module.run)
        module.add_arguments(command)


def run(args: argparse.Namespace) -> None:
    args.run_data_command(args)
