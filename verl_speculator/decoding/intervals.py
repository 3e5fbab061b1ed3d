"""Confidence intervals over prompts, by bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from verl_speculator.decoding.metrics import AcceptanceCounts, sum_counts

NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """`sum(numerators) / sum(denominators)` over prompts, with the percentile bootstrap's interval.

    Whole prompts are drawn with replacement (Efron and Tibshirani 1993, chapter 13), because the rounds of one prompt
    are alike. The same seed gives the same interval.

    Raises:
        ValueError: Nothing to divide by.
    """
    # Not by scipy: its import takes longer than all of this, and one resample without a draft makes its interval NaN.
    values = torch.tensor([list(numerators), list(denominators)], dtype=torch.float64)
    if float(values[1].sum()) <= 0:
        raise ValueError("the denominators must add up to more than 0")
    num_prompts = values.size(1)
    generator = torch.Generator().manual_seed(seed)
    ratios = []
    # Chunks keep the drawn indices small whatever the number of prompts.
    for _ in range(10):
        drawn = torch.randint(num_prompts, (NUM_RESAMPLES // 10, num_prompts), generator=generator)
        tops, bottoms = values[:, drawn].sum(-1)
        ratios.append((tops / bottoms)[bottoms > 0])
    tail = (1 - confidence) / 2
    low, high = torch.cat(ratios).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(float(values[0].sum() / values[1].sum()), low, high)


def acceptance_length_interval(
    per_prompt: Sequence[AcceptanceCounts], *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """`acceptance_length` over prompts, and how far another set of prompts like these might differ.

    One prompt says nothing about others: with fewer than two that drafted, the interval is all that is possible, from
    1 to one more than the longest draft.
    """
    return _length_interval(per_prompt, [counts.num_drafts for counts in per_prompt], confidence, seed)


def tokens_per_round_interval(
    per_prompt: Sequence[AcceptanceCounts], *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """As `acceptance_length_interval`, of `tokens_per_round`."""
    return _length_interval(per_prompt, [counts.num_rounds for counts in per_prompt], confidence, seed)


def _length_interval(
    per_prompt: Sequence[AcceptanceCounts], divisors: list[int], confidence: float, seed: int
) -> Interval:
    if sum(divisor > 0 for divisor in divisors) < 2:
        total = sum_counts(per_prompt)
        mean = 1.0 + total.num_accepted_tokens / max(sum(divisors), 1)
        return Interval(mean, 1.0, 1.0 + len(total.accepted_per_position))
    accepted = [counts.num_accepted_tokens for counts in per_prompt]
    ratio = ratio_interval(accepted, divisors, confidence=confidence, seed=seed)
    return Interval(1.0 + ratio.mean, 1.0 + ratio.low, 1.0 + ratio.high)
