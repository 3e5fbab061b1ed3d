"""`verl-speculator regenerate`: training data whose answers are the target's own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from verl_speculator.cli.arguments import (
    add_data_arguments,
    add_decoding_arguments,
    add_load_arguments,
    settings_of,
)
from verl_speculator.errors import ConfigError
from verl_speculator.evaluation.settings import EvaluationInput, EvaluationSettings

PURPOSE = "let the base model answer the training prompts itself"
DESCRIPTION = """\
Let the base model answer the prompts of chat data itself. A speculator has to predict what the base says, not what is
in the data: trained on the base's own answers it drafts longer.

  verl-speculator regenerate --base BASE --data train.parquet --output answers.parquet

A run that was stopped goes on where it stood when it is started again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_arguments(parser, limit=None)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.parquet", help="where the answers go")
    add_decoding_arguments(parser, max_new_tokens=1024, batch_size=32)
    add_load_arguments(parser.add_argument_group("how to load the base"))


def run(args: argparse.Namespace) -> None:
    from verl_speculator.evaluation.preflight import check_input

    given = EvaluationInput(args.base, (), tuple(args.data), args.chat_template)
    # Most flags are those of an evaluation, and mean the same.
    settings = settings_of(args)
    if not args.output.absolute().parent.is_dir():
        raise ConfigError(f"--output: there is no folder {str(args.output.absolute().parent)!r} to write into")
    check_input(given, settings)
    written = _answer(args, given, settings)
    cut = f", {written.num_cut} of them cut at --max-new-tokens={args.max_new_tokens}" if written.num_cut else ""
    print(f"{args.output}: {written.num_answers} answers{cut}; {written.num_tokens} tokens")


def _answer(args: argparse.Namespace, given: EvaluationInput, settings: EvaluationSettings) -> Any:
    from tqdm import tqdm

    from verl_speculator.base_model.loading import (
        explain_out_of_memory,
        load_target,
        load_tokenizer_and_config,
        pick_device,
    )
    from verl_speculator.data.regeneration import RegenerationSettings, regenerate_answers
    from verl_speculator.decoding import SamplingParams

    sampling = SamplingParams(args.temperature, args.top_p, args.top_k)
    regeneration = RegenerationSettings(
        args.max_new_tokens, args.batch_size, sampling, args.seed, messages_key=args.messages_key
    )
    pick_device(args.device)  # one that is not there is said before anything is read
    tokenizer, _ = load_tokenizer_and_config(given.base, settings, given.chat_template)
    with explain_out_of_memory("loading the base model", "use --dtype bfloat16 or a larger device"):
        target = load_target(given.base, settings, tokenizer)
    with tqdm(desc="Answering", unit="chat") as bar, explain_out_of_memory("answering", settings.memory_advice):

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return regenerate_answers(
            target.model, tokenizer, given.data, args.output, regeneration, limit=settings.num_prompts, report=report
        )
