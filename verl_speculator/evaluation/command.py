"""``verl-speculator eval`` and ``train-report``: from flags to files and to what is printed."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from verl_speculator.errors import ConfigError, MissingFileError, SpeculatorError
from verl_speculator.evaluation.arguments import input_of, settings_of
from verl_speculator.evaluation.preflight import check_input, check_report_folder

EXIT_USER_ERROR = 2


def run_eval(args: argparse.Namespace) -> int:
    return _run(_eval, args)


def run_train_report(args: argparse.Namespace) -> int:
    return _run(_train_report, args)


def _run(command: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """The exit status; a user's mistake is one line."""
    try:
        command(args)
    except SpeculatorError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def _eval(args: argparse.Namespace) -> None:
    settings, given = settings_of(args), input_of(args)
    for file in args.imports:
        _import_file(Path(file))
    check_input(given, settings)
    if args.report is not None:
        check_report_folder(args.report)
    elif args.run_dir:
        raise ConfigError("--run-dir is for the report: give --report FOLDER too")
    for run in args.run_dir:
        _check_run(run)

    from verl_speculator.evaluation.run import evaluate
    from verl_speculator.evaluation.table import format_table

    with _ProgressBars() as bars:
        result = evaluate(
            given.base,
            given.speculators,
            given.data,
            settings=settings,
            chat_template=given.chat_template,
            report=bars.update,
        )
    print(format_table(result, shutil.get_terminal_size().columns))
    for note in result.notes:
        print(f"note: {note}")
    if args.report is None:
        print("\nAdd --report FOLDER for eval.json and a page with charts and the prompts themselves.")
        return

    from verl_speculator.evaluation.report import write_report

    files = write_report(result, args.report, args.run_dir)
    print(f"\nWrote {files.json} and {files.page}: open the latter in a browser.")


def _check_run(run: Path) -> None:
    from verl_speculator.evaluation.curves import read_curves

    try:
        read_curves(run)
    except SpeculatorError as error:
        raise type(error)(f"--run-dir: {error}") from error


def _train_report(args: argparse.Namespace) -> None:
    from verl_speculator.evaluation.train_report import write_train_report

    print(f"Wrote {write_train_report(args.run_dir, args.output)}: open it in a browser.")


def _import_file(file: Path) -> None:
    """Run a file of the user's for the speculator types that it registers."""
    if not file.is_file():
        raise MissingFileError(f"--import: there is no file {str(file)!r}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--import: {str(file)!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        # What the user's own code raises has no common type.
        raise ConfigError(f"--import: {str(file)!r} fails with {type(error).__name__}: {error}") from error


class _ProgressBars:
    """A bar for each thing that is done, one after the other."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._doing = ""

    def __enter__(self) -> _ProgressBars:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def update(self, doing: str, done: int, total: int) -> None:
        if self._bar is None or doing != self._doing:
            self._close()
            self._doing, self._bar = doing, tqdm(total=total, desc=doing, unit="prompt", dynamic_ncols=True)
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
