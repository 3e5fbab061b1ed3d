"""The ``verl-speculator`` command. Heavy imports wait until a subcommand needs them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from verl_speculator.evaluation import arguments, regenerate
from verl_speculator.serving import command as serving

_TRAIN_HELP = """\
Train a speculator. Settings are Hydra overrides on verl's sft_trainer_engine; the most used ones:

  model.partial_pretrain=BASE              base model: a Hugging Face folder or name
  data.train_files=train.parquet           chat data: a column `messages` of {role, content}
  data.val_files=test.parquet
  model.speculator.n_predict=5             tokens drafted ahead
  model.speculator.method=sum_rnn          or sum_lstm
  model.speculator.inner_dim=1024          also emb_dim and proj_dim; "1024.2048" is a stack
  trainer.default_local_dir=FOLDER         where checkpoints go
  engine=megatron optim=megatron           the base on Megatron; engine.tensor_model_parallel_size=2

Everything is checked before a process is started. On several machines run torchrun yourself:
  torchrun --nnodes=2 ... -m verl_speculator.trainer.sft_trainer key=value ...
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="verl-speculator",
        description="Train the draft heads of speculative decoding inside verl, measure them and serve them in vLLM.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    answers = _add(
        commands, "regenerate", "let the base model answer the training prompts itself", regenerate.DESCRIPTION
    )
    regenerate.add_arguments(answers)
    _add_train_arguments(_add(commands, "train", "train a speculator on chat data", _TRAIN_HELP))
    report = _add(commands, "train-report", "plot a training run", arguments.REPORT_DESCRIPTION)
    arguments.add_train_report_arguments(report)
    evaluation = _add(
        commands, "eval", "measure speculators: acceptance length, losslessness, speed", arguments.EVAL_DESCRIPTION
    )
    arguments.add_eval_arguments(evaluation)
    serving.add_parsers(commands)
    args, rest = parser.parse_known_args(argv)
    if args.version:
        from verl_speculator import __version__

        print(__version__)
        return 0
    if args.command in serving.COMMANDS:
        # What is no option of ours is vLLM's.
        return serving.run(args, rest)
    # argparse takes no overrides that come after an option.
    if rest and (args.command != "train" or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return _run(parser, args, rest)


def _add(commands: Any, name: str, purpose: str, description: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=purpose, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _add_train_arguments(train: argparse.ArgumentParser) -> None:
    train.add_argument("--nproc", type=int, help="processes on this machine; default: one for each GPU, at least 1")
    train.add_argument("--ray", action="store_true", help="run the workers under Ray instead of torchrun")
    train.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="configuration overrides")


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: Sequence[str]) -> int:
    if args.command == "train":
        return _train(args, [*args.overrides, *rest])
    if args.command == "regenerate":
        return regenerate.run(args)
    if args.command is None:
        parser.print_help()
        return 0
    from verl_speculator.evaluation.command import run_eval, run_train_report

    return run_eval(args) if args.command == "eval" else run_train_report(args)


def _train(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    from omegaconf import OmegaConf

    from verl_speculator.errors import SpeculatorError
    from verl_speculator.trainer.config.compose import load_config
    from verl_speculator.trainer.launch import launch

    # As under torchrun: an adapter in the current folder can be named.
    sys.path.insert(0, os.getcwd())
    try:
        if args.print_config:
            print(OmegaConf.to_yaml(load_config(overrides)), end="")
            return 0
        launch(overrides, num_processes=args.nproc, use_ray=args.ray)
    except SpeculatorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
