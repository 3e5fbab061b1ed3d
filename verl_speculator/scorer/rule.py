"""The scorer as an acceptance rule of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from verl_speculator.decoding.acceptance import AcceptanceRule, Verification
from verl_speculator.decoding.rules import parse_rule
from verl_speculator.errors import ConfigError
from verl_speculator.scorer.model import AutoModelForSPDScoring, ScoringActor, read_config

SCORER = "scorer"


class ScorerRule:
    """Accepts a mismatch from a score on: that of one scorer, or the mean of an ensemble's."""

    def __init__(self, scorers: ScoringActor | Sequence[ScoringActor], threshold: float | None = None) -> None:
        """`threshold` None takes the first scorer's own, by the place in the answer where it has several."""
        self.scorers = [scorers] if isinstance(scorers, ScoringActor) else list(scorers)
        config = self.scorers[0].scoring_config
        self.threshold = config.threshold if threshold is None else threshold
        self._by_position = config.thresholds_by_position if threshold is None else ()

    @property
    def needs_draft_logits(self) -> bool:
        return any(scorer.needs_draft_logits for scorer in self.scorers)

    @property
    def target_calls(self) -> int:
        return sum(scorer.target_calls for scorer in self.scorers)

    def scores(self, verification: Verification) -> Tensor:
        """[B, k], from 0 to 1."""
        return torch.stack([scorer.score_tokens(verification) for scorer in self.scorers]).mean(0)

    def accepts(self, verification: Verification) -> Tensor:
        positions = verification.positions
        thresholds = torch.full(positions.shape, self.threshold, device=positions.device)
        for place, threshold in self._by_position:
            thresholds = torch.where(positions >= place, threshold, thresholds)
        return self.scores(verification) >= thresholds


def scorer_folders(text: str) -> tuple[list[str], float | None]:
    """Of `scorer:FOLDER[+FOLDER][@THRESHOLD]` the folders, whose scores are averaged, and the threshold; else none.

    Raises:
        ConfigError: The threshold is no number.
    """
    name, found, rest = text.partition(":")
    if name != SCORER or not found:
        return [], None
    folders, has_threshold, number = rest.partition("@")
    try:
        threshold = float(number) if has_threshold else None
    except ValueError as error:
        raise ConfigError(f"{text!r}: the threshold after @ must be a number") from error
    return folders.split("+"), threshold


def check_rule(text: str) -> None:
    """Raises SpeculatorError if `text` names no rule, or a folder without a scorer."""
    folders, _ = scorer_folders(text)
    for folder in folders:
        read_config(folder)
    if not folders:
        parse_rule(text)


def load_rule(text: str, model: Any, threshold: float | None = None) -> AcceptanceRule | None:
    """The rule that `text` names, for this target; None is strict. `threshold` is for a scorer that names none."""
    folders, named = scorer_folders(text)
    if not folders:
        return parse_rule(text)
    scorers = [AutoModelForSPDScoring.from_pretrained(folder, model) for folder in folders]
    return ScorerRule(scorers, threshold if named is None else named)
