"""How words follow one another in this world, and two rule rewards. verl's reward workers load this file.

Each topic has two chains of words: the policy begins with the usual one and seldom uses the rare one.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

NUM_TOPICS = 4
WORDS = [f"w{number}" for number in range(40)]
# What a reward looks at: every pair of words, or the last word alone.
STYLE, LAST_WORD = "style", "last-word"


def chains(topic: int) -> tuple[dict[str, str], dict[str, str]]:
    """The word that comes after each, usually and seldom."""
    found = []
    for name in ("usual", "rare"):
        circle = list(WORDS)
        random.Random(f"{name} {topic}").shuffle(circle)
        found.append(dict(zip(circle, circle[1:] + circle[:1], strict=True)))
    return found[0], found[1]


def compute_score(data_source: str, solution_str: str, ground_truth: str, **ignored: Any) -> float:
    """From 0 to 1: the share of pairs that follow the rare chain, or whether the last word has an even number.

    Args:
        data_source: `style`, which moves everything that is written, or `last-word`, which moves next to nothing.
        solution_str: The answer.
        ground_truth: The topic.
    """
    words = solution_str.split()
    if data_source == LAST_WORD:
        return float(bool(words) and words[-1] in WORDS[::2])
    _, rare = chains(int(ground_truth))
    pairs = list(pairwise(words))
    return sum(rare.get(one) == other for one, other in pairs) / max(len(pairs), 1)
