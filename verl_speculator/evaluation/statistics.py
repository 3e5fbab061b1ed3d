"""The arithmetic of a report that is not acceptance: repetition, paired speed-ups."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from verl_speculator.evaluation.results import Speedup


def repeated_share(outputs: Iterable[Sequence[int]], width: int = 4) -> float | None:
    """The share of `width`-grams that their own output has had before: 1 - distinct / all, summed over outputs.

    Welleck et al. 2020, "Neural text generation with unlikelihood training", call it seq-rep-n. None where no output
    is as long as one.
    """
    total = distinct = 0
    for tokens in outputs:
        grams = [tuple(tokens[start : start + width]) for start in range(len(tokens) - width + 1)]
        total += len(grams)
        distinct += len(set(grams))
    return 1 - distinct / total if total else None


def paired_speedup(ratios: Sequence[float]) -> Speedup:
    """Median and quartiles of the batches' own ratios: load that comes and goes hits both sides of a ratio alike."""
    if len(ratios) == 1:
        return Speedup(ratios[0], ratios[0], ratios[0], list(ratios))
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Speedup(median, low, high, list(ratios))
