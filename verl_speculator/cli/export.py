"""`verl-speculator export`: a speculator as other engines read it."""

from __future__ import annotations

import argparse
from pathlib import Path

from verl_speculator.errors import ConfigError

PURPOSE = "write a speculator as other engines read it"
DESCRIPTION = """\
Write a speculator in another form, and check that its reader will find all it needs:

  arctic   Snowflake's Arctic Inference
  ibm      engines that read IBM's MLPSpeculator (vLLM 0.5 to 0.9, fms-extras, TGI)
  eagle3   engines that read EAGLE-3's own files; vLLM reads a checkpoint as it is, and these too
  dflash   the same for DFlash
  hf       a folder for the Hugging Face hub, with a model card; vLLM reads it with this package installed

  verl-speculator export --format hf outputs/global_step_100 OUT --push owner/name --eval report/eval.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="speculator folder or global_step_N folder")
    parser.add_argument("destination", metavar="DST", help="new folder")
    parser.add_argument("--format", required=True, choices=("arctic", "ibm", "hf", "eagle3", "dflash"))
    parser.add_argument("--base-architecture", help="the base model's, such as LlamaForCausalLM; for arctic only")

    hub = parser.add_argument_group("for the hub, with --format hf")
    hub.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to this repository")
    hub.add_argument("--private", action="store_true", help="a repository that is made is a private one")
    hub.add_argument("--base", metavar="OWNER/NAME", help="the base model's name on the hub, for the model card")
    hub.add_argument("--data", metavar="NAME", help="what it was trained on, for the model card")
    hub.add_argument("--license", metavar="NAME", help="such as apache-2.0, for the model card")
    hub.add_argument("--eval", type=Path, metavar="eval.json", help="the measured acceptance, for the model card")


def run(args: argparse.Namespace) -> None:
    from verl_speculator.serving.hub import CardFacts, push, require_hub_name

    given = [f"--{name}" for name in ("push", "base", "data", "license", "eval") if getattr(args, name) is not None]
    if args.format != "hf" and given:
        raise ConfigError(f"{given[0]} is for --format hf")
    if args.push is not None:
        require_hub_name(args.push, "--push")
    card = CardFacts(args.base, args.data, args.license, args.eval)

    from verl_speculator.serving.export import export_speculator

    folder = export_speculator(args.source, args.destination, args.format, args.base_architecture, card)
    files = ", ".join(sorted(file.name for file in folder.iterdir()))
    print(f"Wrote {folder} ({files}) and checked it.")
    if args.push is not None:
        print(f"Uploaded it to {push(folder, args.push, private=args.private)}.")
