"""`verl-speculator export`: a speculator as other engines read it."""

from __future__ import annotations

import argparse

PURPOSE = "write a speculator as other engines read it"
DESCRIPTION = """\
Write a speculator in another form, and check that its reader will find all it needs:

  arctic   Snowflake's Arctic Inference
  ibm      engines that read IBM's MLPSpeculator (vLLM 0.5 to 0.9, fms-extras, TGI)
  hf       a folder to upload to the Hugging Face hub; vLLM reads it with this package installed
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="speculator folder or global_step_N folder")
    parser.add_argument("destination", metavar="DST", help="new folder")
    parser.add_argument("--format", required=True, choices=("arctic", "ibm", "hf"))
    parser.add_argument("--base-architecture", help="the base model's, such as LlamaForCausalLM; for arctic only")


def run(args: argparse.Namespace) -> None:
    from verl_speculator.serving.export import export_speculator

    folder = export_speculator(args.source, args.destination, args.format, args.base_architecture)
    files = ", ".join(sorted(file.name for file in folder.iterdir()))
    print(f"Wrote {folder} ({files}) and checked it.")
