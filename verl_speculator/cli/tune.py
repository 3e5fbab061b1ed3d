"""`verl-speculator tune`: short trainings over a space of settings, ranked by what their drafts are worth."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from verl_speculator.cli.arguments import require_training
from verl_speculator.errors import ConfigError

PURPOSE = "search for good settings with short trainings"
DESCRIPTION = """\
Train over a grid of settings, or over random draws, and rank what comes of it: acceptance length in validation over
the cost of a round, in weights that are read.

  verl-speculator tune --output search --grid model.speculator.n_predict=2,3,4 --draw optim.lr=1e-5:1e-3 --trials 4 \\
      model.partial_pretrain=BASE data.train_files=train.parquet data.val_files=test.parquet \\
      trainer.total_training_steps=200 data.hidden_states_cache=states

Every other setting is as for `train`. It ends with a table and the winner's command, also in search/tune.md. Started
again it goes on where it was stopped, and more --trials add to what is there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where trials and the table go")
    parser.add_argument(
        "--grid", action="append", default=[], metavar="KEY=A,B,C", help="try every value; may be given several times"
    )
    parser.add_argument(
        "--draw",
        action="append",
        default=[],
        metavar="KEY=LOW:HIGH",
        help="draw from a range, evenly for whole numbers and else evenly in the logarithm; may be given several times",
    )
    parser.add_argument("--trials", type=int, default=1, help="draws for each point of the grid; default: %(default)s")
    parser.add_argument("--parallel", type=int, default=1, help="trainings at a time; default: %(default)s")
    parser.add_argument("--nproc", type=int, default=1, help="processes of a training; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every training")


def run(args: argparse.Namespace) -> None:
    require_training()
    from verl_speculator.trainer.config.compose import load_config
    from verl_speculator.trainer.launch import plan

    sys.path.insert(0, os.getcwd())
    overrides = (*args.overrides, *args.rest)
    grid = {key: values.split(",") for key, values in (_key_and_values(text, "--grid") for text in args.grid)}
    draws = {key: _range(key, values) for key, values in (_key_and_values(text, "--draw") for text in args.draw)}
    if not grid and not draws:
        raise ConfigError("--grid or --draw must be given: they say what is searched")
    for name in ("trials", "parallel", "nproc"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(args, name)}")
    # Every value once, with the first of the others: what cannot work is said before anything trains.
    first = {key: str(values[0]) for key, values in {**grid, **draws}.items()}
    probe = args.output / "check"
    for key, value in ((key, str(value)) for key, values in {**grid, **draws}.items() for value in values):
        settings = [f"{name}={chosen}" for name, chosen in {**first, key: value}.items()]
        trial = [*overrides, *settings, f"trainer.default_local_dir={probe}"]
        plan(trial, num_processes=args.nproc, use_ray=False)
        config = load_config(trial)
    probe.rmdir()
    if config.data.val_files is None:
        raise ConfigError("data.val_files must be given: trials are ranked by what validation accepts")

    from verl_speculator.trainer.tuning import Search, run_search, write_report

    output = args.output.absolute()
    search = Search(overrides, grid, draws, args.trials, args.seed)
    trials = run_search(search, config.model.path, output, args.nproc, args.parallel)
    print(write_report(trials, search, output, args.nproc), end="")


def _key_and_values(text: str, flag: str) -> tuple[str, str]:
    key, equals, values = text.partition("=")
    if not equals or not key or not all(values.split(",")):
        raise ConfigError(f"{flag} must be KEY=VALUES, got {text!r}")
    return key, values


def _range(key: str, values: str) -> tuple[float, float]:
    """Two whole numbers, or two numbers above 0."""
    for kind in (int, float):
        try:
            low, high = map(kind, values.split(":"))
        except ValueError:
            continue
        if low < high and (kind is int or low > 0):
            return low, high
    raise ConfigError(f"--draw {key}={values} must be LOW:HIGH, two whole numbers or two numbers above 0")
