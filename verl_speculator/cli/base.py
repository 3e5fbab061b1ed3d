"""`verl-speculator base`: a base model brought into the form that everything here reads."""

from __future__ import annotations

import argparse
from pathlib import Path

PURPOSE = "bring a base model into the form that training and serving read"
DESCRIPTION = """\
Turn a GGUF file into a Hugging Face folder: weights dequantised, chat template kept, and the tokens that end and pad
an answer as the file's own header names them.

  verl-speculator base from-gguf MODEL.gguf FOLDER
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("form", choices=("from-gguf",), help="the form that SRC has")
    parser.add_argument("source", type=Path, metavar="SRC", help="the file to read")
    parser.add_argument("destination", type=Path, metavar="DST", help="the new folder")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="default: %(default)s"
    )


def run(args: argparse.Namespace) -> None:
    from verl_speculator.base_model.gguf import convert_gguf

    parameters = convert_gguf(args.source, args.destination, args.dtype)
    print(f"Wrote {args.destination}: {parameters / 1e6:.1f} M parameters in {args.dtype}.")
