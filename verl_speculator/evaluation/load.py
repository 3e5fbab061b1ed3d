"""A server of vLLM under load, with a speculator or without: vLLM's client (`vllm bench serve`) sends and times."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl_speculator.data.chats import read_chats
from verl_speculator.data.prompts import encode_prompt
from verl_speculator.errors import ConfigError, SpeculatorError
from verl_speculator.evaluation.load_results import LoadResult, LoadSettings

# Its own command asks for a distribution named vllm, which the CPU build is not.
_CLIENT = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
START_SECONDS = 1800


class LoadError(SpeculatorError, RuntimeError):
    """A server that did not start, or a client that ended in an error; the message has its last words."""


def write_prompts(base: str, files: Sequence[str], messages_key: str, limit: int, folder: Path) -> Path:
    """The first `limit` chats as the client reads them: text by the base's chat template, one a line."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    file = folder / "prompts.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for chat in read_chats(files, messages_key, limit):
            text, _ = encode_prompt(tokenizer, chat.asked, f"--data: {chat.where}", tools=chat.tools)
            lines.write(json.dumps({"prompt": text}) + "\n")
    return file


class Server:
    """A server of vLLM on a port of its own, from `command` and for as long as the context lasts."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.command, self.log = [*command, "--host", "127.0.0.1", "--port", str(port)], log
        self.url = f"http://127.0.0.1:{port}"

    def __enter__(self) -> str:
        with self.log.open("w") as output:
            self.process = subprocess.Popen(self.command, stdout=output, stderr=subprocess.STDOUT)
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self.url

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise LoadError(f"the server did not start ({self.log}): {_last_words(self.log.read_text())}")

    def _stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def served_name(url: str) -> str:
    """The name under which a running server has its model.

    Raises:
        ConfigError: Nothing answers there.
    """
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, urllib.error.URLError, ValueError, LookupError) as error:
        raise ConfigError(f"--url: no server of an OpenAI-compatible API answers at {url} ({error})") from error


def put_under_load(
    name: str, drafts: int | None, url: str, base: str, prompts: Path, settings: LoadSettings
) -> list[LoadResult]:
    """One result for each number of requests at a time; the first of them is sent once more before, to warm up."""
    model = served_name(url)
    run_client(url, model, base, prompts, settings.concurrency[0], settings)
    results = []
    for concurrency in settings.concurrency:
        found = run_client(url, model, base, prompts, concurrency, settings)
        results.append(
            LoadResult(
                name,
                drafts,
                concurrency,
                tokens_per_second=found["output_throughput"],
                **{f"{key}_p{p}": found[f"p{p}_{key}_ms"] for key in ("ttft", "tpot") for p in (50, 99)},
                acceptance_length=found.get("spec_decode_acceptance_length"),
            )
        )
    return results


def run_client(
    url: str, model: str, base: str, prompts: Path, concurrency: int, settings: LoadSettings
) -> dict[str, Any]:
    """What vLLM's client writes of one run.

    Raises:
        LoadError: It ended in an error, or not every request was answered.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "backend": "openai",
            "endpoint": "/v1/completions",
            "base-url": url,
            "model": base,
            "served-model-name": model,
            "dataset-name": "custom",
            "dataset-path": prompts,
            "custom-output-len": settings.max_tokens,
            "temperature": settings.temperature,
            # The prompts have all that the template puts before the text.
            "extra-body": json.dumps({"add_special_tokens": False}),
            "num-prompts": settings.requests,
            "max-concurrency": concurrency,
            "percentile-metrics": "ttft,tpot",
            "metric-percentiles": "50,99",
            "result-dir": folder,
            "result-filename": "result.json",
        }
        flags = ["--skip-chat-template", "--disable-shuffle", "--disable-tqdm", "--save-result"]
        command = [sys.executable, "-c", _CLIENT, *flags]
        command += [text for key, value in options.items() for text in (f"--{key}", str(value))]
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
        file = Path(folder) / "result.json"
        if result.returncode or not file.is_file():
            raise LoadError(f"vLLM's load client ended in an error: {_last_words(result.stderr or result.stdout)}")
        found: dict[str, Any] = json.loads(file.read_text())
    if found["completed"] != settings.requests:
        raise LoadError(f"{settings.requests - found['completed']} of {settings.requests} requests had no answer")
    return found


def _last_words(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-3:])[-600:] or "it said nothing"
