"""`verl-speculator train-report`: a training run as a page."""

from __future__ import annotations

import argparse
from pathlib import Path

PURPOSE = "plot a training run"
DESCRIPTION = """\
Plot a training run as one HTML file that opens in any browser: loss, accuracy per head, acceptance length, learning
rate, gradient norm, speed. RUN_DIR is the run's trainer.default_local_dir, a metrics log, or TensorBoard's folder.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a training run's folder")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: RUN_DIR/report.html")


def run(args: argparse.Namespace) -> None:
    from verl_speculator.reports.training import write_train_report

    print(f"Wrote {write_train_report(args.run_dir, args.output)}: open it in a browser.")
