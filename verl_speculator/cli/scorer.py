"""`verl-speculator scorer ...`: a scorer of draft/target mismatches, from data to figures."""

from __future__ import annotations

import argparse

from verl_speculator.cli import scorer_data, scorer_evaluate, scorer_fit, scorer_label, scorer_train
from verl_speculator.cli.arguments import add_subcommands

PURPOSE = "train and measure a scorer that accepts harmless draft/target mismatches (lossy)"
DESCRIPTION = """\
A scorer decides which tokens that differ from the target's choice may stay: decoding with it is lossy, and everything
that it brings forth says so. Without it decoding stays lossless.

  verl-speculator scorer data --base TARGET --draft DRAFT --data train.parquet --answers answer --output windows.parquet
  verl-speculator scorer label --base TARGET --windows windows.parquet --output labelled.parquet
  verl-speculator scorer fit --base TARGET --windows labelled.parquet --output scorer
  verl-speculator scorer train rollout.target_model_path=TARGET model.scorer.path=scorer \\
      data.train_files=labelled.parquet
  verl-speculator scorer evaluate --base TARGET --draft DRAFT --validation val.parquet --data test.parquet \\
      --answers answer --accept probability --accept scorer:scorer --output evaluation.json
"""
_COMMANDS = {
    "data": scorer_data,
    "label": scorer_label,
    "fit": scorer_fit,
    "train": scorer_train,
    "evaluate": scorer_evaluate,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_subcommands(parser, _COMMANDS, "scorer_command")


def run(args: argparse.Namespace) -> int | None:
    status: int | None = args.run_subcommand(args)
    return status
