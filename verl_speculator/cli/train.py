"""`verl-speculator train`: from overrides to torchrun, or to Ray."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from verl_speculator.cli.arguments import require_training
from verl_speculator.trainer.config.flags import add_common_flags, add_own_flags, flag_overrides

PURPOSE = "train a speculator on chat data"
DESCRIPTION = """\
Train a speculator on chat data, a column `messages` of {role, content} in parquet:

  verl-speculator train --speculator-type eagle3 --verifier-name-or-path BASE --data-path train.parquet --save-path OUT

A speculator's own options come with its name: verl-speculator train --speculator-type mlp --help
Everything else is a setting, key=value on verl's sft_trainer_engine, and so is each option; --print-config says which:

  model.speculator.n_predict=5             is --n-predict 5
  engine.tensor_model_parallel_size=2      with --engine megatron

Everything is checked before a process is started. On several machines run torchrun yourself:
  torchrun --nnodes=2 ... -m verl_speculator.train --speculator-type eagle3 ... key=value ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_flags(parser)
    parser.add_argument("--nproc", type=int, help="processes on this machine; default: one for each GPU, at least 1")
    parser.add_argument("--ray", action="store_true", help="run the workers under Ray instead of torchrun")
    parser.add_argument(
        "--print-config", action="store_true", help="print the settings and the configuration, and exit"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings")


def add_arguments_of(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Add what depends on the command line: the options of the speculator that it trains."""
    # As under torchrun: a module in the current folder can be named.
    sys.path.insert(0, os.getcwd())
    add_own_flags(parser, arguments)


def run(args: argparse.Namespace) -> None:
    require_training()
    from omegaconf import OmegaConf

    from verl_speculator.trainer.config.compose import load_config
    from verl_speculator.trainer.launch import launch

    overrides = flag_overrides(args, [*args.overrides, *args.rest])
    if args.print_config:
        print(f"# verl-speculator train {shlex.join(overrides)}".rstrip())
        print(OmegaConf.to_yaml(load_config(overrides)), end="")
    else:
        launch(overrides, num_processes=args.nproc, use_ray=args.ray)
