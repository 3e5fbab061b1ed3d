"""`verl-speculator data ...`: what is done with data before a training, a module for each of its subcommands."""

from __future__ import annotations

import argparse

from verl_speculator.cli import data_hidden_states, data_prepare
from verl_speculator.cli.arguments import add_subcommands

PURPOSE = "prepare training data"
DESCRIPTION = "Prepare training data."
_COMMANDS = {"prepare": data_prepare, "hidden-states": data_hidden_states}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_subcommands(parser, _COMMANDS, "data_command")


def run(args: argparse.Namespace) -> None:
    args.run_subcommand(args)
