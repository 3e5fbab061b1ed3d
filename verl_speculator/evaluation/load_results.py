"""What a server is asked for in a load test, what comes of it, and what to serve with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LoadSettings:
    """What is asked of a server: `requests` for each of these numbers at a time, of up to `max_tokens` each."""

    concurrency: Sequence[int]
    requests: int
    max_tokens: int
    temperature: float = 0.0


@dataclass(frozen=True)
class LoadResult:
    """What one number of requests at a time came to; times in milliseconds.

    Attributes:
        name: Of the server: what it drafts with.
        drafts: Tokens drafted at a time, 0 without a speculator, None for a server that someone else started.
        tpot_p50: Time for a token after the first, the mean of a request: half of the requests have less.
        acceptance_length: Tokens for each verification; None where nothing was drafted.
    """

    name: str
    drafts: int | None
    concurrency: int
    tokens_per_second: float
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    acceptance_length: float | None


def best_schedule(results: Sequence[LoadResult]) -> list[tuple[int, int, int]]:
    """vLLM's `num_speculative_tokens_per_batch_size`: the number of drafts with most tokens a second at each load.

    `(first, last, drafts)` of ranges of numbers of requests: each measured number stands for those up to the next, the
    first for those before it too, and neighbours with the same answer are one.
    """
    levels = sorted({result.concurrency for result in results})
    ranges: list[tuple[int, int, int]] = []
    for i, level in enumerate(levels):
        here = [result for result in results if result.concurrency == level]
        best = max(here, key=lambda result: result.tokens_per_second).drafts or 0
        first = 1 if i == 0 else level
        last = levels[i + 1] - 1 if i + 1 < len(levels) else max(level, first)
        if ranges and ranges[-1][2] == best:
            ranges[-1] = (ranges[-1][0], last, best)
        else:
            ranges.append((first, last, best))
    return ranges
