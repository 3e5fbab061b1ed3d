from __future__ import annotations

from collections.abc import Callable

import pytest

from verl_speculator.decoding import AcceptanceCounts, Interval
from verl_speculator.evaluation.results import (
    Costs,
    DrafterResult,
    EvaluationResult,
    PromptResult,
    Speedup,
    TargetHealth,
)


def make_drafter(label: str, rounds: list[list[int]], *, k: int = 3, text: str = "some text", **changes):
    """A drafter whose prompts had these accepted drafts in their rounds."""
    counts = AcceptanceCounts.from_drafts([a for prompt in rounds for a in prompt], k)
    prompts = [
        PromptResult(
            file="chats.parquet",
            row=row,
            request=f"question {row}",
            text=text,
            num_tokens=1 + sum(a + 1 for a in accepted),
            acceptance_length=1 + sum(accepted) / len(accepted),
            num_drafts=len(accepted),
            accepted_per_round=accepted,
            identical=True,
            pieces=[("The", 0, False), (text, 1, True), (" end", 1, False)],
        )
        for row, accepted in enumerate(rounds)
    ]
    values = {
        "label": label,
        "path": f"/runs/{label}",
        "num_draft_tokens": k,
        "num_parameters": 1234,
        "acceptance_length": Interval(counts.acceptance_length, 1.5, 3.0),
        "tokens_per_round": Interval(counts.tokens_per_round, 1.5, 3.0),
        "acceptance_per_position": counts.acceptance_rate_per_position,
        "accepted_lengths": counts.drafts_per_accepted_length,
        "num_drafts": counts.num_drafts,
        "num_accepted_tokens": counts.num_accepted_tokens,
        "target_forwards": 40,
        "target_forwards_plain": 100,
        "target_forwards_saved": 0.6,
        "identical_outputs": True,
        "num_identical": len(prompts),
        "speedup": Speedup(1.5, 1.25, 1.75, [1.25, 1.5, 1.75]),
        "speedup_predicted": 1.6,
        "speedup_memory_bound": 1.8,
        "costs": Costs(plain_step=0.002, draft=0.001, verify=0.003, other=0.0005),
        "prompts": prompts,
    }
    return DrafterResult(**{**values, **changes})


def make_result(*speculators: DrafterResult, **changes) -> EvaluationResult:
    speculators = speculators or (make_drafter("one", [[3, 0], [1, 2, 2]]),)
    values = {
        "base": "/models/base",
        "data": ["chats.parquet"],
        "num_prompts": len(speculators[0].prompts),
        "num_skipped": 0,
        "settings": {
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": 0,
            "seed": 0,
            "draft_sampling": "greedy",
            "max_new_tokens": 32,
            "batch_size": 1,
            "dtype": "float32",
            "device": "cpu",
        },
        "versions": {"torch": "2"},
        "machine": {"accelerator": None, "architecture": "x86_64", "cores": 2, "threads": 1},
        "target": TargetHealth(2.5, 99, 0.25, 50, 300.0),
        "speculators": list(speculators),
        "prompt_lookup": make_drafter("prompt lookup", [[0, 0], [0, 1, 0]], path=None, num_parameters=0),
        "notes": [],
        "created": "2026-01-01T00:00:00+00:00",
    }
    return EvaluationResult(**{**values, **changes})


@pytest.fixture
def drafter() -> Callable[..., DrafterResult]:
    return make_drafter


@pytest.fixture
def result() -> Callable[..., EvaluationResult]:
    return make_result
