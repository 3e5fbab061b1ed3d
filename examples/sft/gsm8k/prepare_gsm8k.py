#!/usr/bin/env python3
"""Write GSM8K as chat data: train.parquet and test.parquet with a column `messages`.

    ./prepare_gsm8k.py                                          from the Hugging Face hub
    ./prepare_gsm8k.py --train train.jsonl --test test.jsonl    from local copies

The calculator notes of the data set, such as <<48/2=24>>, are left out: a model that answers does not write them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from chat_rows import Messages, Row, column, read_rows, report, write_split

from verl_speculator.errors import ConfigError, DataError, SpeculatorError

DATASET, SUBSET = "openai/gsm8k", "main"
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
_CALCULATION = re.compile(r"<<[^<>]*>>")


def to_messages(row: Row, source: str) -> Messages:
    """One question and its worked answer."""
    question, answer = column(row, "question", source), column(row, "answer", source)
    for key, value in (("question", question), ("answer", answer)):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{source!r} has a row whose {key!r} is no text")
    return [
        {"role": "user", "content": f"{question} {INSTRUCTION}"},
        {"role": "assistant", "content": _CALCULATION.sub("", answer)},
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("~/data/gsm8k"), help="folder; default: %(default)s")
    parser.add_argument("--train", help="a local file instead of the hub's train split")
    parser.add_argument("--test", help="a local file instead of the hub's test split")
    options = parser.parse_args(arguments)
    try:
        if (options.train is None) != (options.test is None):
            raise ConfigError("--train and --test go together: give both local files or neither")
        output = options.output.expanduser()
        splits = {"train": options.train, "test": options.test}
        # Both are read before anything is written.
        prepared = {
            split: [to_messages(row, file or DATASET) for row in read_rows(file or DATASET, split, SUBSET)]
            for split, file in splits.items()
        }
        for split, rows in prepared.items():
            write_split(rows, output / f"{split}.parquet")
    except SpeculatorError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
