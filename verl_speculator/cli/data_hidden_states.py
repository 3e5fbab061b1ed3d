"""`verl-speculator data hidden-states`: a frozen base's hidden states, written before a training reads them."""

from __future__ import annotations

import argparse
import os
import sys

from verl_speculator.cli.arguments import require_training

PURPOSE = "write the base's hidden states, so that trainings need not compute them"
DESCRIPTION = """\
Run the frozen base once over the training and the validation data and keep its hidden states in a folder. Settings are
those of the training that will read them, the folder among them:

  verl-speculator data hidden-states --nproc 8 data.hidden_states_cache=FOLDER \\
      model.partial_pretrain=BASE data.train_files=train.parquet data.val_files=test.parquet

A training with the same settings then runs without the base's layers. What is in the folder already is kept, so a
command that was stopped goes on. On several machines run torchrun yourself:
  torchrun --nnodes=2 ... -m verl_speculator.trainer.store_hidden_states key=value ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc", type=int, help="processes on this machine; default: one for each GPU, at least 1")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the training")


def run(args: argparse.Namespace) -> None:
    require_training()
    from verl_speculator.trainer.launch import launch_hidden_states

    sys.path.insert(0, os.getcwd())
    launch_hidden_states([*args.overrides, *args.rest], num_processes=args.nproc)
