"""`verl-speculator data prepare`: chats in any form, as the parquet files that training reads."""

from __future__ import annotations

import argparse
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from verl_speculator.errors import ConfigError, DataError

if TYPE_CHECKING:
    from verl_speculator.data.preparation import Form

PURPOSE = "make training data of chats in any form"
DESCRIPTION = """\
Write any chat data as train.parquet and test.parquet with a column `messages` of {role, content}.

  verl-speculator data prepare chats.jsonl --output data
  verl-speculator data prepare 'logs/*.json' more.parquet --output data
  verl-speculator data prepare pairs.csv --prompt-key ask --response-key say --output data
  verl-speculator data prepare HuggingFaceH4/ultrachat_200k --split train_sft --output data

A source is a .json, .jsonl, .parquet or .csv file, a folder or a pattern of them, or a data set's name on the Hugging
Face hub. Chats are a column of messages, {role, content} or ShareGPT's {from, value}, or two columns for prompt and
answer. Rows that cannot be used are left out, counted and named.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="a file, folder, pattern, or name on the hub")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for train.parquet and test.parquet, or one .parquet file"
    )
    parser.add_argument("--messages-key", metavar="COLUMN", help="of messages (default: by its name)")
    parser.add_argument("--prompt-key", metavar="COLUMN", help="of prompts, with --response-key (default: by its name)")
    parser.add_argument("--response-key", metavar="COLUMN", help="of answers")
    parser.add_argument("--system-key", metavar="COLUMN", help="of system messages, next to --prompt-key")
    parser.add_argument(
        "--unanswered", action="store_true", help="keep chats without an answer: `regenerate` gives them one"
    )
    parser.add_argument("--split", help="of a data set on the hub (default: train)")
    parser.add_argument("--subset", help="of a data set on the hub, also called its configuration")
    parser.add_argument("--test-split", metavar="SPLIT", help="of the same data set, for test.parquet")
    parser.add_argument("--test-source", metavar="SOURCE", help="another source for test.parquet")
    parser.add_argument(
        "--test-fraction", type=float, metavar="SHARE", help="held out otherwise (default: 0.05 in a folder, else 0)"
    )
    parser.add_argument("--limit", "--max-rows", dest="limit", type=int, metavar="N", help="the first N rows only")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle (default: %(default)s)")
    parser.add_argument("--strict", action="store_true", help="a row that cannot be used is an error")


def run(args: argparse.Namespace) -> None:
    from verl_speculator.data.preparation import Form

    form = Form(args.messages_key, args.prompt_key, args.response_key, args.system_key, args.unanswered)
    output = args.output.expanduser()
    is_file = output.suffix.lower() == ".parquet"
    if args.test_split and args.test_source:
        raise ConfigError("give --test-source or --test-split, not both")
    if is_file and (args.test_split or args.test_source or args.test_fraction):
        raise ConfigError("--output must be a folder for a test.parquet next to train.parquet, and not one file")
    if args.test_split and any(Path(source).expanduser().is_file() for source in args.sources):
        raise ConfigError("--test-split is for data sets of the hub: name a local file with --test-source")
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {args.limit}")
    train = output if is_file else output / "train.parquet"
    fraction = 0.0
    if args.test_split or args.test_source:
        others = [args.test_source] if args.test_source else args.sources
        # First, so that nothing is written if it cannot be.
        _write(args, form, others, args.test_split or args.split, output / "test.parquet", None, 0.0)
    else:
        fraction = (0.0 if is_file else 0.05) if args.test_fraction is None else args.test_fraction
    _write(args, form, args.sources, args.split, train, output / "test.parquet" if fraction else None, fraction)


def _write(
    args: argparse.Namespace,
    form: Form,
    sources: list[str],
    split: str | None,
    file: Path,
    test: Path | None,
    fraction: float,
) -> None:
    from verl_speculator.data.preparation import LeftOut, to_chats, write_chats
    from verl_speculator.data.sources import read_source

    left_out = LeftOut()
    rows = chain.from_iterable(read_source(source, split, args.subset) for source in sources)
    chats = to_chats(islice(rows, args.limit), form, left_out, strict=args.strict)
    try:
        counts = write_chats(chats, file, test, fraction, args.seed)
    except DataError as error:
        if not left_out.counts:
            raise
        reason, places = next(iter(left_out.places.items()))
        raise DataError(f"{error}: {places[0]}, {reason}") from error
    for written, count in zip([file, test], counts, strict=False):
        print(f"{count:>8} conversations in {written}")
    for line in left_out.lines():
        print(line)
