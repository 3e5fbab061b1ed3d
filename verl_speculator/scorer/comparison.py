"""Acceptance rules side by side: each setting is chosen on validation questions and measured on others.

What is written of a rule is in `closed_loop.RuleResult`. Rules are lossy; `strict`, the lossless one, is their measure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from verl_speculator.base_model.loading import Target
from verl_speculator.decoding import AcceptanceRule
from verl_speculator.decoding.acceptance import Verification
from verl_speculator.errors import naming
from verl_speculator.scorer.answers import AnswerCheck
from verl_speculator.scorer.closed_loop import (
    Answered,
    Choice,
    RuleResult,
    answer_questions,
    choose_setting,
    compare,
    score_quantiles,
)
from verl_speculator.scorer.data import AnyDrafter, Question, Report
from verl_speculator.scorer.labels import Oracle
from verl_speculator.scorer.rule import ScorerRule, Thresholds, check_rule, load_rule, scorer_folders

# From careful to bold.
GRIDS: dict[str, tuple[float, ...]] = {
    "random": (0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4),
    "probability": (0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.003),
    "top-k": (2, 3, 4, 6, 10),
    "kl": (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 4.0),
    "margin": (0.99, 0.98, 0.97, 0.95, 0.925, 0.9, 0.875, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.2),
    "entropy": (0.8, 0.7, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05),
}
_THRESHOLDS = 120  # of which seven are tried


@dataclass(frozen=True)
class RuleSpec:
    """A rule as it is asked for: `NAME` (its setting is chosen), `NAME:NUMBERS`, `scorer:FOLDER`, `scorer:FOLDER@0.7`.

    `LABEL=` before it gives it a name; a scorer's is otherwise its folder's.
    """

    label: str
    text: str

    @classmethod
    def parse(cls, text: str) -> RuleSpec:
        """Raises ConfigError for what is no rule, MissingFileError where a scorer's folder has none."""
        label, found, rest = text.partition("=")
        rule = rest if found else text
        if rule not in GRIDS:
            check_rule(rule)
        folders, _ = scorer_folders(rule)
        name = "+".join(Path(folder).name for folder in folders) or rule
        return cls(label if found else name, rule)

    @property
    def is_scorer(self) -> bool:
        return bool(scorer_folders(self.text)[0])

    @property
    def is_chosen(self) -> bool:
        """Whether the setting is chosen on validation questions."""
        return self.text in GRIDS or (self.is_scorer and scorer_folders(self.text)[1] is None)

    def make(self, target: Target, setting: float | Thresholds | None) -> AcceptanceRule | None:
        """The rule, with `setting` where it is chosen; None is strict."""
        text = f"{self.text}:{setting:g}" if self.text in GRIDS else self.text
        return load_rule(text, target.model, setting)


class _Listener(ScorerRule):
    """Notes the scores of all mismatches and accepts none: decoding stays strict."""

    def __init__(self, rule: ScorerRule) -> None:
        super().__init__(rule.scorers, rule.thresholds)
        self.heard: list[Tensor] = []

    def accepts(self, verification: Verification) -> Tensor:
        self.heard.append(self.scores(verification)[verification.mismatches].cpu())
        return torch.zeros_like(verification.matches)


@dataclass
class Comparison:
    """`results` by label, on the test questions; `choices` on the validation ones."""

    results: dict[str, RuleResult]
    choices: dict[str, Choice]
    examples: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "rules": {label: asdict(result) for label, result in self.results.items()},
            "validation": {label: asdict(choice) for label, choice in self.choices.items()},
            "examples": self.examples,
        }


@dataclass(frozen=True)
class ComparisonSettings:
    num_drafts: int
    max_new_tokens: int
    batch_size: int
    accuracy_bound: float = 0.01
    num_examples: int = 4
    num_oracle: int = 0  # questions on which the oracle is measured; 0 leaves it out
    threshold_places: tuple[int, ...] = ()  # from where on in an answer a scorer gets another threshold


def compare_rules(
    target: Target,
    drafter: AnyDrafter,
    validation: Sequence[Question],
    test: Sequence[Question],
    specs: Sequence[RuleSpec],
    settings: ComparisonSettings,
    *,
    check: AnswerCheck | None = None,
    report: Report = lambda doing, done, total: None,
) -> Comparison:
    """Choose the settings on `validation` under the accuracy bound, then decode `test` once with each rule.

    A rule for which no setting keeps the bound is measured as strict decoding, and says so by its `setting` of None.
    """
    check = check or AnswerCheck()

    def decode(questions: Sequence[Question], rule: Callable[[list[int]], Any], doing: str) -> Answered:
        return answer_questions(
            target,
            drafter,
            questions,
            rule,
            num_drafts=settings.num_drafts,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            check=check,
            report=lambda _, done, total: report(doing, done, total),
        )

    strict = decode(test, lambda batch: None, "strict")
    held: Answered | None = None
    outcome = Comparison({"strict": compare("strict", None, strict, strict)}, {})
    answered = {"strict": strict}
    for spec in specs:
        with naming(f"--accept {spec.text}"):
            setting = None
            if spec.is_chosen:
                if held is None:
                    held = decode(validation, lambda batch: None, "strict, validation")
                choice = _choose(spec, target, held, lambda rule, doing: decode(validation, rule, doing), settings)
                outcome.choices[spec.label], setting = choice, choice.setting
                if setting is None:
                    outcome.results[spec.label] = compare(spec.label, None, strict, strict)
                    continue
            rule = spec.make(target, choice.by_position if spec.is_chosen and choice.by_position else setting)
            answered[spec.label] = decode(test, _always(rule), spec.label)
            outcome.results[spec.label] = compare(spec.label, setting, answered[spec.label], strict)
    if settings.num_oracle:
        some = min(settings.num_oracle, len(test))
        few = test[:some]

        def oracle(batch: list[int]) -> Oracle:
            return Oracle(target, [strict.answers[index] for index in batch], check, settings.max_new_tokens)

        base = decode(few, lambda batch: None, "strict, for the oracle")
        outcome.results["oracle"] = compare("oracle", None, decode(few, oracle, "oracle"), base)
    outcome.examples = _examples(target, test, answered, settings.num_examples)
    return outcome


def _always(rule: AcceptanceRule | None) -> Callable[[list[int]], AcceptanceRule | None]:
    return lambda batch: rule


def _choose(
    spec: RuleSpec,
    target: Target,
    strict: Answered,
    decode: Callable[[Callable[[list[int]], Any], str], Answered],
    settings: ComparisonSettings,
) -> Choice:
    rule = spec.make(target, 0.5) if spec.is_scorer else None
    grid: Sequence[float] = GRIDS.get(spec.text, ())
    if isinstance(rule, ScorerRule):
        listener = _Listener(rule)
        decode(lambda batch: listener, f"{spec.label}, scores")
        grid = score_quantiles(torch.cat(listener.heard), _THRESHOLDS) if listener.heard else ()

    def with_setting(setting: float) -> Answered:
        made = ScorerRule(rule.scorers, setting) if isinstance(rule, ScorerRule) else spec.make(target, setting)
        return decode(lambda batch: made, f"{spec.label} at {setting:.3g}")

    choice = choose_setting(spec.label, grid, with_setting, strict, accuracy_bound=settings.accuracy_bound)
    if not isinstance(rule, ScorerRule) or choice.setting is None or not settings.threshold_places:
        return choice
    return _by_position(spec, rule, grid, choice, strict, decode, settings)


def _by_position(
    spec: RuleSpec,
    rule: ScorerRule,
    grid: Sequence[float],
    choice: Choice,
    strict: Answered,
    decode: Callable[[Callable[[list[int]], Any], str], Answered],
    settings: ComparisonSettings,
) -> Choice:
    """Go through the places, and let what follows each have the threshold that saves most within the same bound."""
    assert choice.setting is not None
    chosen: Thresholds = ((0, choice.setting),)
    tried = list(choice.tried)
    saved = max((one.tokens_per_target_call for one in choice.tried if one.setting == choice.setting), default=0.0)
    for place in settings.threshold_places:

        def from_here_on(setting: float, before: Thresholds = chosen, place: int = place) -> Answered:
            made = ScorerRule(rule.scorers, (*before, (place, setting)))
            return decode(lambda batch: made, f"{spec.label} at {setting:.3g} from {place} on")

        found = choose_setting(spec.label, grid, from_here_on, strict, accuracy_bound=settings.accuracy_bound)
        tried += found.tried
        best = max((one.tokens_per_target_call for one in found.tried if one.setting == found.setting), default=0.0)
        if found.setting is not None and found.setting != chosen[-1][1] and best > saved:
            chosen, saved = (*chosen, (place, found.setting)), best
    return Choice(choice.setting, tried, chosen if len(chosen) > 1 else ())


def _examples(
    target: Target, questions: Sequence[Question], answered: dict[str, Answered], count: int
) -> list[dict[str, Any]]:
    """Answers in which most rules accepted something, token by token: `[text, whether it was an accepted mismatch]`."""
    lossy = [label for label in answered if label != "strict"]
    busiest = sorted(
        range(len(questions)), key=lambda index: -sum(bool(answered[label].lossy_tokens[index]) for label in lossy)
    )[:count]
    return [
        {
            "question": questions[index].text,
            "answer": questions[index].answer,
            "outputs": [
                {
                    "rule": label,
                    "correct": one.correct[index],
                    "target_calls": one.target_calls[index],
                    "pieces": _pieces(target, one.tokens[index], set(one.lossy_tokens[index])),
                }
                for label, one in answered.items()
            ],
        }
        for index in busiest
    ]


def _pieces(target: Target, tokens: Sequence[int], lossy: set[int]) -> list[tuple[str, bool]]:
    pieces, shown = [], ""
    for place in range(len(tokens)):
        text = target.tokenizer.decode(tokens[: place + 1], skip_special_tokens=True)
        pieces.append((text[len(shown) :], place in lossy))
        shown = text
    return pieces
