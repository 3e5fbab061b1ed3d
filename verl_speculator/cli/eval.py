"""`verl-speculator eval`: from flags to files and to what is printed."""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
from pathlib import Path

from verl_speculator.cli.arguments import (
    add_data_arguments,
    add_decoding_arguments,
    add_import_argument,
    add_load_arguments,
    import_all,
    settings_of,
)
from verl_speculator.cli.progress import ProgressBars
from verl_speculator.errors import ConfigError, SpeculatorError
from verl_speculator.evaluation.settings import DRAFT_SAMPLING, EvaluationInput, EvaluationSettings

PURPOSE = "measure speculators: acceptance length, losslessness, speed"
DESCRIPTION = """\
Measure speculators on the prompts of chat data: decode each prompt with the base model alone and with the speculator,
and report tokens per target forward (acceptance length), whether the output stayed the same, and the speed-up.

  verl-speculator eval --base BASE --speculator FOLDER --data test.parquet --report out/

With --accept drafts are kept that the target would not have written: that is lossy, and is shown beside the lossless
decoding of the same speculator; --answers COLUMN tells what it costs in accuracy.

Several --speculator are compared side by side. --report writes eval.json and index.html, which opens in any browser.

The exit status is 0; 1 if greedy outputs with drafts differ from plain decoding's; 2 for what cannot be measured.
"""
EXIT_DIFFERENT = 1
_DEFAULTS = EvaluationSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to measure")
    add_data_arguments(what, limit=_DEFAULTS.num_prompts)
    what.add_argument(
        "--speculator",
        required=True,
        action="append",
        metavar="FOLDER",
        help="a speculator/ folder, a global_step_N that holds one, or a name on the hub; repeat to compare",
    )
    add_import_argument(what)
    what.add_argument(
        "--accept",
        action="append",
        metavar="RULE",
        help="also decode with an acceptance rule, which is lossy: probability:P, top-k:K, kl:NATS, margin:RATIO, "
        "entropy:SHARE, random:RATE, accept-all, or scorer:FOLDER[@THRESHOLD]; repeat to compare",
    )
    what.add_argument(
        "--answers", metavar="COLUMN", help="column of the data with the right answers: accuracy is measured too"
    )
    output = parser.add_argument_group("what to leave behind")
    output.add_argument("--report", type=Path, metavar="FOLDER", help="write eval.json and index.html there")
    output.add_argument(
        "--json", metavar="FILE", help="write what eval.json holds to FILE; - is standard output, and nothing else then"
    )
    output.add_argument(
        "--run-dir",
        action="append",
        default=[],
        type=Path,
        metavar="FOLDER",
        help="a training run whose curves the report shows; default: the run that the speculator lies in",
    )
    output.add_argument(
        "--allow-differences",
        action="store_true",
        help="exit with 0 even if greedy outputs with drafts differ from plain decoding's",
    )
    how = parser.add_argument_group("how to decode")
    add_decoding_arguments(how, max_new_tokens=_DEFAULTS.max_new_tokens, batch_size=_DEFAULTS.batch_size)
    how.add_argument(
        "--num-draft-tokens",
        "--num-speculative-tokens",
        type=int,
        action="append",
        metavar="K",
        help="drafted per round (default: n_predict); repeat to compare",
    )
    how.add_argument(
        "--draft-sampling",
        choices=DRAFT_SAMPLING,
        default=_DEFAULTS.draft_sampling,
        help="how the speculator drafts when the target samples (default: %(default)s)",
    )
    add_load_arguments(parser.add_argument_group("how to load the base"))


def run(args: argparse.Namespace) -> int:
    from verl_speculator.evaluation.preflight import check_input, check_report_folder

    settings = settings_of(args)
    given = EvaluationInput(
        base=args.base, speculators=tuple(args.speculator), data=tuple(args.data), chat_template=args.chat_template
    )
    import_all(args.imports)
    check_input(given, settings)
    if args.report is not None:
        check_report_folder(args.report)
    elif args.run_dir:
        raise ConfigError("--run-dir is for the report: give --report FOLDER too")
    if args.json not in (None, "-") and not Path(args.json).absolute().parent.is_dir():
        raise ConfigError(f"--json: there is no folder {str(Path(args.json).absolute().parent)!r} to write into")
    for folder in args.run_dir:
        _check_run(folder)

    from verl_speculator.evaluation.run import evaluate
    from verl_speculator.reports.evaluation import as_json, write_report
    from verl_speculator.reports.page import write_file
    from verl_speculator.reports.table import format_table

    with ProgressBars() as bars:
        result = evaluate(
            given.base,
            given.speculators,
            given.data,
            settings=settings,
            chat_template=given.chat_template,
            report=bars.update,
        )
    # Where a program reads standard output, people read the other one.
    say = functools.partial(print, file=sys.stderr if args.json == "-" else sys.stdout)
    say(format_table(result, shutil.get_terminal_size().columns))
    for note in result.notes:
        say(f"note: {note}")
    if args.json == "-":
        print(as_json(result), end="")
    elif args.json is not None:
        write_file(Path(args.json), as_json(result))
    if args.report is not None:
        files = write_report(result, args.report, args.run_dir)
        say(f"\nWrote {files.json} and {files.page}: open the latter in a browser.")
    elif args.json is None:
        say("\nAdd --report FOLDER for eval.json and a page with charts and the prompts themselves.")
    differ = any(drafter.identical_outputs is False for drafter in (*result.speculators, result.prompt_lookup))
    return EXIT_DIFFERENT if differ and not args.allow_differences else 0


def _check_run(folder: Path) -> None:
    from verl_speculator.reports.curves import read_curves

    try:
        read_curves(folder)
    except SpeculatorError as error:
        raise type(error)(f"--run-dir: {error}") from error
