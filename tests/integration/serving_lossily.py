"""An acceptance rule in vLLM: what it answers, what it is not allowed to, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.sampling_params import StructuredOutputsParams

from tests.integration.serving_errors import message
from tests.integration.serving_world import NEW_TOKENS

STRICTLY = {"extra_args": {"lossy": False}}


def answer(world: Path, rule: str, make_engine: Callable[..., Any], speculator: Path) -> dict[str, Any]:
    """Prompts with the rule and, in the same batch, without; then what is refused."""
    prompts, lossy = (json.loads((world / name).read_text()) for name in ("prompts.json", "lossy.json"))
    engine = make_engine(world, speculator, speculative={"accept": lossy["rules"][rule]["accept"], "lossy": True})
    common = {"max_tokens": NEW_TOKENS, "ignore_eos": True, "stop_token_ids": [lossy["stop"]]}
    answers = engine.generate([(ids, common | extra) for ids in prompts for extra in ({}, STRICTLY)])
    report: dict[str, Any] = {"lossy": answers[::2], "strict": answers[1::2], "counters": engine.counters()}
    report["strict_counters"] = {"before": engine.counters()}
    report["logprobs"] = engine.generate([(prompts[0], {"max_tokens": 4, "logprobs": 1, **STRICTLY})])
    report["strict_counters"]["after"] = engine.counters()
    refused = {"logprobs": 1, "temperature": 0.5, "repetition_penalty": 1.4, "bad_words": ["w1"], "min_tokens": 2}
    refused["structured_outputs"] = StructuredOutputsParams(regex="(yes|no)")
    report["refused"] = {
        name: message(lambda given={name: value}: engine.generate([(prompts[0], given)]))
        for name, value in refused.items()
    }
    engine.close()
    return report
