"""Whole answers decoded with an acceptance rule: what it saves, what it costs, and where to put a threshold.

Decoding with a rule is lossy; everything here compares with strict decoding of the same prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from verl_speculator.base_model.loading import Target
from verl_speculator.data.prompts import left_pad
from verl_speculator.decoding import AcceptanceRule, DecodingResult, speculative_generate
from verl_speculator.errors import ConfigError
from verl_speculator.scorer.answers import AnswerCheck
from verl_speculator.scorer.data import AnyDrafter, Question, Report, decode_texts
from verl_speculator.scorer.model import ScoringActor
from verl_speculator.scorer.rule import ScorerRule

CONFIDENCE = 0.95  # one-sided


class SpeculativeDecodingRollout:
    """Draft, verify, score, compare with the threshold; again, until the answers end."""

    def __init__(
        self,
        target: Target,
        drafter: AnyDrafter,
        rule: AcceptanceRule | ScoringActor | None,
        *,
        num_drafts: int,
        max_new_tokens: int,
        threshold: float | None = None,
    ) -> None:
        """`rule` None is strict; a `ScoringActor` is used with `threshold`, by default its own."""
        self._target = target
        self._drafter = drafter
        self._rule = ScorerRule(rule, threshold) if isinstance(rule, ScoringActor) else rule
        self._num_drafts = num_drafts
        self._max_new_tokens = max_new_tokens

    def generate_sequences(self, prompts: Sequence[Sequence[int]]) -> DecodingResult:
        """Greedy answers to prompts; `result.lossy_tokens` says which tokens the target did not choose."""
        input_ids, mask = left_pad(prompts, self._target.tokenizer, self._target.device)
        return speculative_generate(
            self._target.model,
            self._drafter,
            input_ids,
            mask,
            eos_token_id=self._target.stop_tokens,
            lossy_rule=self._rule,
            num_draft_tokens=self._num_drafts,
            max_new_tokens=self._max_new_tokens,
        )


@dataclass
class Answered:
    """What a rule made of each question, in their order."""

    correct: list[bool] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    target_calls: list[int] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    lossy_tokens: list[list[int]] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def tokens_per_target_call(self) -> float:
        return sum(self.num_tokens) / sum(self.target_calls)

    @property
    def num_lossy_accepted(self) -> int:
        return sum(map(len, self.lossy_tokens))

    @property
    def num_unanswered(self) -> int:
        return sum(answer is None for answer in self.answers)


def answer_questions(
    target: Target,
    drafter: AnyDrafter,
    questions: Sequence[Question],
    make_rule: Callable[[list[int]], AcceptanceRule | ScoringActor | None],
    *,
    num_drafts: int,
    max_new_tokens: int,
    batch_size: int,
    check: AnswerCheck | None = None,
    report: Report = lambda doing, done, total: None,
) -> Answered:
    """Decode all questions with the rule that `make_rule` gives for those of a batch, by their places in `questions`.

    A rule that knows nothing of the questions ignores its argument.
    """
    check = check or AnswerCheck()
    order = sorted(range(len(questions)), key=lambda index: len(questions[index].tokens))
    found: dict[int, tuple[Any, ...]] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rollout = SpeculativeDecodingRollout(
            target, drafter, make_rule(batch), num_drafts=num_drafts, max_new_tokens=max_new_tokens
        )
        result = rollout.generate_sequences([questions[index].tokens for index in batch])
        texts = decode_texts(target, result.tokens)
        lossy = result.lossy_tokens or [[] for _ in batch]
        for row, index in enumerate(batch):
            correct = bool(check.is_correct(texts[row], questions[index].answer))
            found[index] = (
                correct,
                check.extract(texts[row]),
                len(result.tokens[row]),
                result.target_calls[row],
                result.tokens[row],
                lossy[row],
            )
        report("Decoding", start + len(batch), len(order))
    return Answered(*(list(column) for column in zip(*(found[index] for index in range(len(order))), strict=True)))


@dataclass(frozen=True)
class RuleResult:
    """A rule against strict decoding of the same questions; what `summary.json` holds of it.

    Attributes:
        accuracy_loss_upper_95: The upper end of the one-sided 95 % confidence interval of the accuracy that is lost,
            from the paired differences: below the bound, the rule is not inferior by that bound.
        speedup_over_strict: Ratio of the two `tokens_per_target_call`.
    """

    rule: str
    setting: float | None
    is_lossy: bool
    tokens_per_target_call: float
    accuracy: float
    accuracy_loss: float
    accuracy_loss_upper_95: float
    speedup_over_strict: float
    num_prompts: int
    num_lossy_accepted: int
    num_unanswered: int
    equals_strict: bool


def compare(rule: str, setting: float | None, answered: Answered, strict: Answered) -> RuleResult:
    loss, upper = paired_loss(strict.correct, answered.correct)
    return RuleResult(
        rule=rule,
        setting=setting,
        is_lossy=rule != "strict",
        tokens_per_target_call=answered.tokens_per_target_call,
        accuracy=answered.accuracy,
        accuracy_loss=loss,
        accuracy_loss_upper_95=upper,
        speedup_over_strict=answered.tokens_per_target_call / strict.tokens_per_target_call,
        num_prompts=len(answered.correct),
        num_lossy_accepted=answered.num_lossy_accepted,
        num_unanswered=answered.num_unanswered,
        equals_strict=answered.tokens == strict.tokens,
    )


def paired_loss(strict: Sequence[bool], rule: Sequence[bool]) -> tuple[float, float]:
    """Mean loss of accuracy over the same questions, and the upper end of its one-sided 95 % interval.

    The differences are -1, 0 or 1; their mean is normal for the hundreds of questions that this is meant for. Where all
    are 0 their variance says nothing, and the upper end is that of 3 rare events in n (the rule of three).
    """
    differences = [int(before) - int(after) for before, after in zip(strict, rule, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((value - mean) ** 2 for value in differences) / max(n - 1, 1)
    if variance == 0:
        return mean, mean + 3 / n
    return mean, mean + NormalDist().inv_cdf(CONFIDENCE) * math.sqrt(variance / n)


@dataclass(frozen=True)
class Choice:
    """What was tried for a rule on validation questions, and what is taken."""

    setting: float | None  # None: nothing kept the bound but strict decoding
    tried: list[RuleResult]
    # Where thresholds were chosen by the place in the answer: all of them, that of place 0 among them.
    by_position: tuple[tuple[int, float], ...] = ()


def choose_setting(
    name: str,
    settings: Sequence[float],
    decode: Callable[[float], Answered],
    strict: Answered,
    *,
    accuracy_bound: float,
) -> Choice:
    """The setting with most tokens per target call among those whose accuracy loss stays below the bound.

    `settings` go from careful to bold, and bolder ones lose more: the boldest that keeps the bound is found by halving.

    Raises:
        ConfigError: A bound that is not above 0.
    """
    if not 0 < accuracy_bound < 1:
        raise ConfigError(f"accuracy_bound={accuracy_bound} must be between 0 and 1: points of accuracy over 100")
    found: dict[int, RuleResult] = {}
    first, last = 0, len(settings)  # what lies before `first` keeps the bound, and from `last` on breaks it
    while first < last:
        middle = (first + last) // 2
        found[middle] = compare(name, settings[middle], decode(settings[middle]), strict)
        if found[middle].accuracy_loss_upper_95 <= accuracy_bound:
            first = middle + 1
        else:
            last = middle
    tried = [found[index] for index in sorted(found)]
    kept = [one for one in tried if one.accuracy_loss_upper_95 <= accuracy_bound]
    best = max(kept, key=lambda one: one.tokens_per_target_call, default=None)
    if best is None or best.tokens_per_target_call <= strict.tokens_per_target_call:
        return Choice(None, tried)
    return Choice(best.setting, tried)


def score_quantiles(scores: Tensor, count: int) -> list[float]:
    """Thresholds from careful to bold that let through ever more of the mismatches with these `scores [N]`."""
    shares = torch.linspace(1 - 1 / (count + 1), 1 / (count + 1), count, dtype=torch.float64)
    # Not rounded: a head that is sure has many scores close to 1.
    return sorted(set(scores.double().quantile(shares).tolist()), reverse=True)
