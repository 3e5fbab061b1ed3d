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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from verl_speculator.data.preparation import write_chats
from verl_speculator.data.sources import Broken, read_source
from verl_speculator.errors import ConfigError, DataError, SpeculatorError

DATASET, SUBSET = "openai/gsm8k", "main"
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
_CALCULATION = re.compile(r"<<[^<>]*>>")


def read_chats(file: str | None, split: str) -> Iterator[dict[str, Any]]:
    """Questions and their worked answers."""
    for found in read_source(file) if file else read_source(DATASET, split, SUBSET):
        if isinstance(found, Broken):
            raise DataError(f"{found.where}: {found.reason}")
        for key in ("question", "answer"):
            if not isinstance(found.row.get(key), str) or not found.row[key].strip():
                raise DataError(f"{found.where}, has no text in a column {key!r}, only {', '.join(found.row)}")
        yield {
            "messages": [
                {"role": "user", "content": f"{found.row['question']} {INSTRUCTION}"},
                {"role": "assistant", "content": _CALCULATION.sub("", found.row["answer"])},
            ]
        }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("~/data/gsm8k"), help="folder; default: %(default)s")
    parser.add_argument("--train", help="a local file instead of the hub's train split")
    parser.add_argument("--test", help="a local file instead of the hub's test split")
    options = parser.parse_args(arguments)
    try:
        if (options.train is None) != (options.test is None):
            raise ConfigError("--train and --test go together: give both local files or neither")
        for split, file in {"test": options.test, "train": options.train}.items():
            path = options.output.expanduser() / f"{split}.parquet"
            (count,) = write_chats(read_chats(file, split), path, None, 0.0, seed=0)
            print(f"{count:>8} conversations in {path}")
    except SpeculatorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
