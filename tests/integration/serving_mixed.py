"""Run as a script: hundreds of requests of every kind at once in a vLLM with little memory, with and without drafts.

usage: serving_mixed.py WORLD_FOLDER OUTPUT.json
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.integration.serving_in_process import Engine

REQUESTS = 300
SLOTS = 12
# Blocks of 16 tokens: far fewer than the slots can fill, so requests are put off and begun anew.
BLOCKS = 40
SECONDS = 240


def make_requests(prompts: list[list[int]]) -> list[tuple[str, list[int], dict[str, Any], int | None]]:
    """`(id, prompt, parameters, tokens after which it is aborted)`; many prompts begin alike."""
    generator = random.Random(3)
    pattern = StructuredOutputsParams(regex="(yes|no) w[0-9]{1,3}( w[0-9]{1,2}){2,6} end")
    made = []
    for number in range(REQUESTS):
        prompt = [*prompts[-1][: generator.choice((0, 16, 40))], *generator.choice(prompts)]
        settings: dict[str, Any] = {"temperature": 0, "max_tokens": generator.choice((1, 2, 5, 20, 60, 120))}
        aborted_after = None
        match number % 6:
            case 0:
                settings["stop_token_ids"] = generator.sample(range(3, 384), 40)
            case 1:
                settings["structured_outputs"] = pattern
            case 2:
                settings["stop"] = [f"w{generator.randrange(50)}"]
            case 3:
                aborted_after = generator.randrange(1, 30)
            case _:
                settings["ignore_eos"] = True
        made.append((str(number), prompt, settings, aborted_after))
    return made


def run(llm: LLM, requests: list[tuple[str, list[int], dict[str, Any], int | None]]) -> dict[str, Any]:
    """The tokens of every request; those that were aborted have what they had by then."""
    engine, waiting = llm.llm_engine, list(requests)
    limits = {name: limit for name, _, _, limit in requests}
    tokens: dict[str, list[int]] = {}
    end, preemptions = time.monotonic() + SECONDS, 0
    scheduler = engine.engine_core.engine_core.scheduler
    original = scheduler._preempt_request

    def preempt(*args: Any, **kwargs: Any) -> Any:
        nonlocal preemptions
        preemptions += 1
        return original(*args, **kwargs)

    scheduler._preempt_request = preempt
    while waiting or engine.has_unfinished_requests():
        assert time.monotonic() < end, f"after {SECONDS} s {len(waiting)} requests wait and others hang"
        # They come in bursts, not all at once.
        for name, prompt, settings, _ in waiting[:3]:
            engine.add_request(name, {"prompt_token_ids": prompt}, SamplingParams(**settings))
        del waiting[:3]
        for output in engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
            limit = limits[output.request_id]
            if limit is not None and len(tokens[output.request_id]) >= limit and not output.finished:
                engine.abort_request([output.request_id])
    return {"tokens": tokens, "preemptions": preemptions}


def main(world: Path) -> dict[str, Any]:
    prompts = json.loads((world / "prompts.json").read_text())
    requests = make_requests(prompts)
    report: dict[str, Any] = {"limits": {name: limit for name, _, _, limit in requests if limit is not None}}
    for name, source in (("none", None), ("lstm", world / "lstm" / "global_step_60")):
        engine = Engine(
            world, source, slots=SLOTS, enable_prefix_caching=True, block_size=16, num_gpu_blocks_override=BLOCKS
        )
        report[name] = run(engine.llm, requests) | {"counters": engine.counters()}
        engine.close()
    return report


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(Path(sys.argv[1]))))
