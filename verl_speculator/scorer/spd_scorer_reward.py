"""The score of a final answer, with the signature of verl's reward functions.

A function of the user's takes its place by `reward.custom_reward_function.path` and `name`.
"""

from __future__ import annotations

from typing import Any

from verl_speculator.scorer.answers import AnswerCheck


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **ignored: Any
) -> dict[str, float]:
    """1 for the answer of the reference, else 0.

    Args:
        data_source: Where the question is from; all are scored alike.
        solution_str: The text.
        ground_truth: The reference: an answer, or a solution that ends with it.
        extra_info: `answer_pattern` in it says how an answer is found.

    Returns:
        `score`, and whether an answer could be `extracted`: 1 or 0.
    """
    correct = AnswerCheck((extra_info or {}).get("answer_pattern")).is_correct(solution_str, ground_truth)
    return {"score": float(correct or False), "extracted": float(correct is not None)}
