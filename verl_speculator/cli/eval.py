"""`verl-speculator eval`: from flags to files and to what is printed."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_speculator.base_model.settings import DEVICE_MAPS, DTYPES
from verl_speculator.errors import ConfigError, MissingFileError, SpeculatorError
from verl_speculator.evaluation.settings import DRAFT_SAMPLING, EvaluationInput, EvaluationSettings

if TYPE_CHECKING:
    from tqdm import tqdm

PURPOSE = "measure speculators: acceptance length, losslessness, speed"
DESCRIPTION = """\
Measure speculators on the prompts of chat data: decode each prompt with the base model alone and with the speculator,
and report tokens per target forward (acceptance length), whether the output stayed the same, and the speed-up.

  verl-speculator eval --base BASE --speculator FOLDER --data test.parquet --report out/

Several --speculator are compared side by side. --report writes eval.json and index.html, which opens in any browser.
"""
_DEFAULTS = EvaluationSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to measure")
    what.add_argument("--base", required=True, metavar="BASE", help="base model: a Hugging Face folder or name")
    what.add_argument(
        "--speculator",
        required=True,
        action="append",
        type=Path,
        metavar="FOLDER",
        help="a speculator/ folder or a global_step_N that holds one; repeat to compare",
    )
    what.add_argument(
        "--data", required=True, action="append", metavar="FILE.parquet", help="chats; repeat for several files"
    )
    what.add_argument("--messages-key", default=_DEFAULTS.messages_key, help="column of chats (default: %(default)s)")
    what.add_argument(
        "--num-prompts", type=int, default=_DEFAULTS.num_prompts, help="the first N rows (default: %(default)s)"
    )
    what.add_argument("--chat-template", type=Path, metavar="FILE", help="Jinja file to use instead of the base's own")
    what.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FILE.py",
        help="a file that registers a speculator type of your own",
    )
    output = parser.add_argument_group("what to leave behind")
    output.add_argument("--report", type=Path, metavar="FOLDER", help="write eval.json and index.html there")
    output.add_argument(
        "--run-dir",
        action="append",
        default=[],
        type=Path,
        metavar="FOLDER",
        help="a training run whose curves the report shows; default: the run that the speculator lies in",
    )
    how = parser.add_argument_group("how to decode")
    how.add_argument("--max-new-tokens", type=int, default=_DEFAULTS.max_new_tokens, help="default: %(default)s")
    how.add_argument("--num-draft-tokens", type=int, metavar="K", help="drafted per round (default: n_predict)")
    how.add_argument(
        "--batch-size", type=int, default=_DEFAULTS.batch_size, help="prompts at once (default: %(default)s, as a chat)"
    )
    how.add_argument(
        "--temperature", type=float, default=_DEFAULTS.temperature, help="0 is greedy (default: %(default)s)"
    )
    how.add_argument("--top-p", type=float, default=_DEFAULTS.top_p, help="default: %(default)s")
    how.add_argument("--top-k", type=int, default=_DEFAULTS.top_k, help="0 is off (default: %(default)s)")
    how.add_argument("--seed", type=int, default=_DEFAULTS.seed, help="of sampling (default: %(default)s)")
    how.add_argument(
        "--draft-sampling",
        choices=DRAFT_SAMPLING,
        default=_DEFAULTS.draft_sampling,
        help="how the speculator drafts when the target samples (default: %(default)s)",
    )
    add_load_arguments(parser.add_argument_group("how to load the base"))


def add_load_arguments(group: Any) -> None:
    """The flags of `LoadSettings`, for every command that decodes."""
    group.add_argument(
        "--dtype", choices=DTYPES, default=_DEFAULTS.dtype, help="auto: float32 on a CPU, else the base's own"
    )
    group.add_argument(
        "--device", default=_DEFAULTS.device, help="such as cpu or cuda:0 (default: an accelerator if any)"
    )
    group.add_argument(
        "--device-map",
        choices=DEVICE_MAPS,
        help="spread the base's layers over all accelerators (default: only if it does not fit on one)",
    )
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a base on the hub")
    group.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the base")
    group.add_argument(
        "--attn-implementation",
        metavar="NAME",
        help="such as eager, sdpa or flash_attention_2 (default: transformers')",
    )


def settings_of(args: argparse.Namespace) -> EvaluationSettings:
    """Of a command whose flags have the names of its fields."""
    return EvaluationSettings(
        **{name: getattr(args, name) for name in EvaluationSettings.__dataclass_fields__ if hasattr(args, name)}
    )


def run(args: argparse.Namespace) -> None:
    from verl_speculator.evaluation.preflight import check_input, check_report_folder

    settings = settings_of(args)
    given = EvaluationInput(
        base=args.base, speculators=tuple(args.speculator), data=tuple(args.data), chat_template=args.chat_template
    )
    for file in args.imports:
        import_file(Path(file))
    check_input(given, settings)
    if args.report is not None:
        check_report_folder(args.report)
    elif args.run_dir:
        raise ConfigError("--run-dir is for the report: give --report FOLDER too")
    for folder in args.run_dir:
        _check_run(folder)

    from verl_speculator.evaluation.run import evaluate
    from verl_speculator.reports.table import format_table

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

    from verl_speculator.reports.evaluation import write_report

    files = write_report(result, args.report, args.run_dir)
    print(f"\nWrote {files.json} and {files.page}: open the latter in a browser.")


def _check_run(folder: Path) -> None:
    from verl_speculator.reports.curves import read_curves

    try:
        read_curves(folder)
    except SpeculatorError as error:
        raise type(error)(f"--run-dir: {error}") from error


def import_file(file: Path) -> None:
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

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, doing: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None or doing != self._doing:
            self.__exit__()
            self._doing, self._bar = doing, tqdm(total=total, desc=doing, unit="prompt", dynamic_ncols=True)
        self._bar.update(done - self._bar.n)
