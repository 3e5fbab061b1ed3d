"""`verl-speculator bench`: a server with the speculator and one without, under the same load."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from verl_speculator.cli.arguments import (
    add_data_arguments,
    add_import_argument,
    add_request_arguments,
    check_request_arguments,
)
from verl_speculator.cli.serve import make_importable, vllm_command
from verl_speculator.errors import ConfigError

if TYPE_CHECKING:
    from verl_speculator.evaluation.load_results import LoadResult, LoadSettings

PURPOSE = "load a server with and without the speculator: tokens a second, latency, acceptance"
DESCRIPTION = """\
Serve the base model in vLLM without the speculator and then with it, send both the same requests, and compare output
tokens a second, time to the first token and between tokens, and acceptance. Options that are not listed go to
`vllm serve`; requests are sent and timed by vLLM's own client.

  verl-speculator bench --base BASE --speculator FOLDER --data test.parquet --output load --concurrency 1 4 16

With --url it loads servers that are running, and starts none; repeat it to compare.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_arguments(parser, limit=64)
    parser.add_argument("--speculator", metavar="FOLDER", help="speculator folder, global_step_N folder, or hub name")
    parser.add_argument("--url", action="append", metavar="URL", help="a running server; repeat to compare")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write load.json and index.html there")
    parser.add_argument(
        "--num-draft-tokens", "--num-speculative-tokens", type=int, metavar="K", help="drafted at a time; default: all"
    )
    add_request_arguments(parser)
    add_import_argument(parser)


def run(args: argparse.Namespace) -> None:
    from verl_speculator.data.chats import check_chat_file
    from verl_speculator.serving.options import read_options
    from verl_speculator.serving.preflight import check_before_serving

    check_request_arguments(args)
    for file in args.data:
        check_chat_file(file, args.messages_key, "--data", column_key="--messages-key")
    if (args.speculator is None) == (args.url is None):
        raise ConfigError("give either --speculator, to serve with it and without, or --url, a server that is running")
    make_importable(args.imports)
    if args.url is None:
        check_before_serving(args.base, args.speculator, args.num_draft_tokens, read_options(args.rest))

    from verl_speculator.evaluation.load_results import LoadSettings
    from verl_speculator.reports.load import format_rows, write_load_report

    settings = LoadSettings(args.concurrency, args.requests, args.max_tokens)
    results = _measure(args, settings)
    print(format_rows(results))
    if args.output is not None:
        keys = ("base", "speculator", "url", "data", "num_prompts", "requests", "max_tokens")
        values = {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
        write_load_report(results, values | {"vllm_options": " ".join(args.rest)}, args.output)
        print(f"Wrote {args.output / 'index.html'}: open it in a browser.")


def _measure(args: argparse.Namespace, settings: LoadSettings) -> list[LoadResult]:
    from verl_speculator.evaluation.load import Server, put_under_load, write_prompts

    results = []
    with tempfile.TemporaryDirectory() as folder:
        prompts = write_prompts(args.base, args.data, args.messages_key, args.num_prompts, Path(folder))
        for url in args.url or ():
            results += put_under_load(url, None, url.rstrip("/"), args.base, prompts, settings)
        for speculator in () if args.url else (None, os.path.abspath(args.speculator)):
            name = "no speculator" if speculator is None else Path(args.speculator).name
            command = vllm_command(args.base, speculator, args.num_draft_tokens, args.rest)
            with Server(command, Path(folder) / "server.log") as url:
                drafts = 0 if speculator is None else args.num_draft_tokens
                results += put_under_load(name, drafts, url, args.base, prompts, settings)
    return results
