"""`verl-speculator grpo`: verl's GRPO with a speculator that drafts the rollout and learns from it."""

from __future__ import annotations

import argparse
import os
import sys

from verl_speculator.cli.arguments import require_training

PURPOSE = "reinforcement learning whose rollout is drafted by a speculator that follows the policy (verl)"
DESCRIPTION = """\
Train a policy with verl's GRPO while vLLM drafts the rollout with a speculator that learns beside it:

  verl-speculator grpo model.path=BASE speculator.path=SPECULATOR data.train_files=prompts.parquet \\
      reward.custom_reward_function.path=reward.py trainer.default_local_dir=out

Settings are key=value on configs/speculator_grpo.yaml, which stands on verl's ppo_trainer; +key=value adds one that
verl reads and does not list. Everything is checked before a process is started. Checkpoints are verl's, with the
speculator beside the policy in out/global_step_N/actor; started again it goes on where it was stopped.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration, and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings")


def run(args: argparse.Namespace) -> None:
    require_training()
    from verl_speculator.rl.grpo_config import check_run, load_config

    overrides = [*args.overrides, *args.rest]
    config = load_config(overrides)
    if args.print_config:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(config), end="")
        return
    check_run(config)
    command = [sys.executable, "-m", "verl_speculator.rl.train_grpo", *overrides]
    # The same process goes on under another name, so that signals and the exit status need no passing on.
    sys.stdout.flush()
    os.execv(command[0], command)
