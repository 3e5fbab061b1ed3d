"""Run as a script: vLLM in this process without and with each speculator; writes what came out as JSON.

usage: serving_in_process.py WORLD_FOLDER OUTPUT.json
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from tests.integration import serving_errors, serving_lossily
from tests.integration import serving_sampling as sampling
from tests.integration.serving_world import N_PREDICT, NEW_TOKENS

SLOTS = 6
SPECULATORS = ("mlp", "mlp_untied_scaled", "rnn_drafts", "rnn_untied_dotted", "lstm", "lstm_tied_embeddings_dotted")
COUNTERS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")


class Engine:
    """An `LLM` with fewer slots than requests and, unless given another size, a prefill in chunks of 32 tokens."""

    def __init__(
        self,
        world: Path,
        speculator: Path | None = None,
        chunk: int = 32,
        slots: int = SLOTS,
        speculative: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        config = None if speculator is None else {"model": str(speculator), **(speculative or {})}
        given: dict[str, Any] = {"enable_prefix_caching": False, "dtype": "float32", "enforce_eager": True} | settings
        self.llm = LLM(
            model=str(world / "base"),
            max_model_len=256,
            max_num_seqs=slots,
            max_num_batched_tokens=chunk,
            enable_chunked_prefill=True,
            disable_log_stats=False,
            seed=0,
            speculative_config=config,
            **given,
        )

    def generate(self, requests: list[tuple[list[int], dict[str, Any]]]) -> list[dict[str, Any]]:
        prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
        params = [SamplingParams(**{"temperature": 0, **settings}) for _, settings in requests]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [_describe(output.outputs[0]) for output in outputs]

    def counters(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for metric in self.llm.get_metrics():
            name = metric.name.removeprefix("vllm:spec_decode_")
            if name in (*COUNTERS, "lossy_accepted"):
                found[name] = metric.value
            elif name == "num_accepted_tokens_per_pos":
                found["accepted_per_position"] = list(metric.values)
        return found

    def close(self) -> None:
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _describe(completion: Any) -> dict[str, Any]:
    logprobs = None
    if completion.logprobs is not None:
        chosen = zip(completion.token_ids, completion.logprobs, strict=True)
        logprobs = [[at[token].logprob, at[token].rank] for token, at in chosen]
    return {
        "tokens": list(completion.token_ids),
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "logprobs": logprobs,
    }


def greedy_requests(prompts: list[list[int]]) -> list[tuple[list[int], dict[str, Any]]]:
    return [(ids, {"max_tokens": NEW_TOKENS, "ignore_eos": True}) for ids in prompts]


def mixed_requests(prompts: list[list[int]], greedy: list[dict[str, Any]]) -> list[tuple[list[int], dict[str, Any]]]:
    """Requests that end early in every way, and those whose logits vLLM changes before it samples."""
    token = greedy[2]["tokens"][18]
    middle = len(greedy[3]["text"]) // 2
    choices = StructuredOutputsParams(choice=["w1 w2 w3 w4", "w1 w2 w30", "no w12"])
    pattern = StructuredOutputsParams(regex="(yes|no) w[0-9]{1,3}( w[0-9]{1,2}){2,6} end")
    return [
        *((ids, {"max_tokens": length}) for ids, length in zip(prompts, (1, 2, 3, 4, 17), strict=False)),
        (prompts[2], {"max_tokens": 60, "stop_token_ids": [token]}),
        (prompts[3], {"max_tokens": 90, "stop": [greedy[3]["text"][middle : middle + 3]]}),
        (prompts[4], {"max_tokens": 40, "logprobs": 2}),
        (prompts[0], {"max_tokens": 30, "logprobs": 0}),
        (prompts[5], {"max_tokens": 40, "repetition_penalty": 1.4}),
        (prompts[6], {"max_tokens": 40, "frequency_penalty": 0.8, "logprobs": 1}),
        (prompts[7], {"max_tokens": 60, "structured_outputs": choices}),
        (prompts[1], {"max_tokens": 60, "structured_outputs": pattern}),
        (prompts[-1], {"max_tokens": 250}),
    ]


def sampled_sequences(engine: Engine, prompt: list[int]) -> list[list[int]]:
    settings = {"temperature": sampling.TEMPERATURE, "top_k": sampling.TOP_K, "max_tokens": sampling.TOKENS}
    requests = [(prompt, {**settings, "ignore_eos": True})] * sampling.SAMPLES
    return [output["tokens"] for output in engine.generate(requests)]


def drafts_near_the_longest_text(engine: Engine, prompts: list[list[int]]) -> dict[str, int]:
    """Drafts of a request that ends at the engine's longest text, of another, and of both at once."""
    end = (prompts[-1] * 5)[:240]
    requests = {"end": [(end, {"max_tokens": 40})], "other": [(prompts[4], {"max_tokens": 40, "ignore_eos": True})]}
    requests["both"] = [*requests["end"], *requests["other"]]
    drafts = {}
    for name, some in requests.items():
        before = engine.counters()["num_draft_tokens"]
        engine.generate(some)
        drafts[name] = engine.counters()["num_draft_tokens"] - before
    return drafts


def lora_answers(world: Path, source: Path | None, greedy: list[tuple[list[int], dict[str, Any]]]) -> dict[str, Any]:
    """Requests that use a LoRA adapter and some that do not, in one batch."""
    engine = Engine(world, source, enable_lora=True, max_lora_rank=8)
    adapter = LoRARequest("adapter", 1, str(world / "adapter"))
    prompts = [{"prompt_token_ids": ids} for ids, _ in greedy]
    params = [SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)] * len(prompts)
    adapters = [adapter if number % 2 else None for number in range(len(prompts))]
    outputs = engine.llm.generate(prompts, params, use_tqdm=False, lora_request=adapters)
    answers = {"tokens": [list(output.outputs[0].token_ids) for output in outputs], "counters": engine.counters()}
    engine.close()
    return answers


def is_runner_hooked() -> bool:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    return hasattr(GPUModelRunner._sample, "_verl_speculator_hook")


def main(world: Path) -> dict[str, Any]:
    prompts = json.loads((world / "prompts.json").read_text())
    greedy, report = greedy_requests(prompts), {}
    mixed: list[tuple[list[int], dict[str, Any]]] = []
    sources = {name: world / name / "global_step_60" for name in SPECULATORS}
    sources |= {"ibm": world / "ibm", "arctic": world / "arctic"}
    for name, source in itertools.chain([("none", None)], sources.items()):
        # With fewer drafts than heads once; all heads are the default.
        fewer = {"num_speculative_tokens": N_PREDICT - 1} if name == "arctic" else {}
        engine = Engine(world, source, speculative=fewer)
        answers = engine.generate(greedy)
        result: dict[str, Any] = {"greedy": answers, "counters": engine.counters(), "runner_hooked": is_runner_hooked()}
        mixed = mixed or mixed_requests(prompts, answers)
        if name not in ("ibm", "arctic"):
            result["mixed"] = engine.generate(mixed)
        if name == "lstm":
            result["near_the_end"] = drafts_near_the_longest_text(engine, prompts)
        if name in ("mlp", "lstm"):
            before = engine.counters()
            result["sampled"] = sampled_sequences(engine, prompts[1])
            result["counters_sampled"] = {
                key: value - before[key] for key, value in engine.counters().items() if key in COUNTERS
            }
        report[name] = result
        engine.close()
    report["lora"] = {name: lora_answers(world, sources.get(name), greedy) for name in ("none", "lstm")}
    report["bfloat16"] = {}
    for name in ("none", "lstm"):
        engine = Engine(world, sources.get(name), dtype="bfloat16")
        report["bfloat16"] |= {name: sampled_sequences(engine, prompts[1]), "counters": engine.counters()}
        engine.close()
    engine = Engine(world, sources["lstm"], enforce_eager=False)
    report["compiled"] = {
        "greedy": engine.generate(greedy),
        "counters": engine.counters(),
        "mode": engine.llm.llm_engine.vllm_config.compilation_config.mode.name,
    }
    engine.close()
    for rule in ("scorer", "accept-all"):
        report[f"lossy {rule}"] = serving_lossily.answer(world, rule, Engine, sources["lstm"])
    return report | {"errors": serving_errors.main(world)}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(Path(sys.argv[1]))))
