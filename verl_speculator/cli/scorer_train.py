"""`verl-speculator scorer train`: GRPO on a scorer's decisions, with verl."""

from __future__ import annotations

import argparse
import os
import sys

PURPOSE = "train a scorer with GRPO on answers (verl)"
DESCRIPTION = """\
Train a scorer with verl's GRPO, on the windows of `scorer data`, or on whole answers that it decodes itself:

  verl-speculator scorer train rollout.target_model_path=TARGET data.train_files=windows.parquet \\
      model.scorer.path=scorer trainer.default_local_dir=out
  verl-speculator scorer train ... rollout.closed_loop=true rollout.draft_model_path=DRAFT

Settings are key=value on configs/spd_train_config.yaml, which stands on verl's ppo_trainer. --config FILE takes them
from a YAML file, and those of the command line win. Everything is checked before a process is started. It ends with the
scorer in out/global_step_N/actor/scorer; started again it goes on where it was stopped.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="settings in YAML, nested or not")
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration, and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings")


def run(args: argparse.Namespace) -> None:
    from verl_speculator.scorer.training_config import check_run, load_config

    overrides = [*args.overrides, *args.rest]
    config = load_config(overrides, args.config)
    if args.print_config:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(config), end="")
        return
    check_run(config)
    arguments = [*(["--config", args.config] if args.config else []), *overrides]
    command = [sys.executable, "-m", "verl_speculator.scorer.train_spd_scorer", *arguments]
    # The same process goes on under another name, so that signals and the exit status need no passing on.
    sys.stdout.flush()
    os.execv(command[0], command)
