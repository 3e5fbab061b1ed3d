"""`verl-speculator scorer label`: which mismatches leave the answer as it was."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from verl_speculator.cli.arguments import add_load_arguments
from verl_speculator.cli.progress import ProgressBars
from verl_speculator.cli.scorer_data import add_batch_arguments, add_pattern_argument, load

PURPOSE = "mine labels: put each draft in, let the target write the rest, compare the answers"
DESCRIPTION = """\
Label the mismatches of windows as AutoJudge (arXiv:2504.20039) does: the draft is put in, the target writes on, and the
mismatch is harmless if the answer stays the same.

  verl-speculator scorer label --base TARGET --windows windows.parquet --output labelled.parquet
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, metavar="BASE", help="the target that the windows are of")
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja file to use instead of the base's own"
    )
    parser.add_argument("--windows", required=True, type=Path, metavar="FILE.parquet", help="of `scorer data`")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.parquet", help="the same, with labels")
    add_pattern_argument(parser)
    add_batch_arguments(parser)
    add_load_arguments(parser.add_argument_group("how to load the target"))


def run(args: argparse.Namespace) -> None:
    from verl_speculator.scorer.windows import read_windows, write_windows

    file = read_windows(args.windows)
    target = load(args)

    from verl_speculator.scorer.answers import AnswerCheck
    from verl_speculator.scorer.labels import mine_labels

    with ProgressBars() as bars:
        labelled, counts = mine_labels(
            target,
            file.windows,
            # What cut the strict answers cuts the others too.
            max_new_tokens=file.info["max_new_tokens"],
            batch_size=args.batch_size,
            check=AnswerCheck(args.answer_pattern),
            report=bars.update,
        )
    write_windows(args.output, labelled, file.scalars, {**file.info, "labels": asdict(counts)})
    print(
        f"Wrote {args.output}: {counts.num_harmless} mismatches are harmless and {counts.num_harmful} are not; "
        f"{counts.num_unknown} come after a harmful one and have no label. Of {counts.num_unanswered} completions no "
        "answer could be extracted, which counts as harm."
    )
