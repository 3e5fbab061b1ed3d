"""The scorer as an acceptance rule of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from verl_speculator.decoding.acceptance import AcceptanceRule, Verification
from verl_speculator.decoding.rules import parse_rule
from verl_speculator.errors import ConfigError
from verl_speculator.scorer.model import AutoModelForSPDScoring, ScoringActor, read_config

SCORER = "scorer"
# Pairs (place in the answer, threshold from there on), the first of place 0.
Thresholds: TypeAlias = tuple[tuple[int, float], ...]


class ScorerRule:
    """Accepts a mismatch from a score on: that of one scorer, or the mean of an ensemble's."""

    def __init__(
        self, scorers: ScoringActor | Sequence[ScoringActor], threshold: float | Thresholds | None = None
    ) -> None:
        """`threshold` may differ by the place in the answer; None takes the first scorer's own."""
        self.scorers = [scorers] if isinstance(scorers, ScoringActor) else list(scorers)
        if threshold is None:
            config = self.scorers[0].scoring_config
            threshold = ((0, config.threshold), *config.thresholds_by_position)
        self.thresholds = ((0, threshold),) if isinstance(threshold, int | float) else threshold

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
        thresholds = torch.zeros(positions.shape, device=positions.device)
        for place, threshold in self.thresholds:
            thresholds = torch.where(positions >= place, threshold, thresholds)
        return self.scores(verification) >= thresholds


def scorer_folders(text: str) -> tuple[list[str], Thresholds | None]:
    """Of `scorer:FOLDER[+FOLDER][@THRESHOLD[,PLACE:THRESHOLD]]` the folders, whose scores are averaged, and thresholds.

    Raises:
        ConfigError: What follows @ is no such thing.
    """
    name, found, rest = text.partition(":")
    if name != SCORER or not found:
        return [], None
    folders, has_threshold, given = rest.partition("@")
    if not has_threshold:
        return folders.split("+"), None
    try:
        first, *others = given.split(",")
        pairs = [one.split(":") for one in others]
        thresholds = ((0, float(first)), *((int(place), float(threshold)) for place, threshold in pairs))
    except ValueError as error:
        raise ConfigError(
            f"{text!r}: after @ there must be a threshold, and others may follow as PLACE:THRESHOLD, such as 0.9,32:0.6"
        ) from error
    if list(thresholds) != sorted(dict(thresholds).items()):
        raise ConfigError(f"{text!r}: the places after @ must be above 0 and in ascending order")
    return folders.split("+"), thresholds


def written(folders: Sequence[str], thresholds: Thresholds | None) -> str:
    """The rule that `scorer_folders` reads as these."""
    if thresholds is None:
        return f"{SCORER}:{'+'.join(folders)}"
    (_, first), *others = thresholds
    numbers = ",".join([f"{first:g}", *(f"{place}:{threshold:g}" for place, threshold in others)])
    return f"{SCORER}:{'+'.join(folders)}@{numbers}"


def check_rule(text: str) -> None:
    """Raises SpeculatorError if `text` names no rule, or a folder without a scorer."""
    folders, _ = scorer_folders(text)
    for folder in folders:
        read_config(folder)
    if not folders:
        parse_rule(text)


def load_rule(text: str, model: Any, threshold: float | Thresholds | None = None) -> AcceptanceRule | None:
    """The rule that `text` names, for this target; None is strict. `threshold` is for a scorer that names none."""
    folders, named = scorer_folders(text)
    if not folders:
        return parse_rule(text)
    scorers = [AutoModelForSPDScoring.from_pretrained(folder, model) for folder in folders]
    return ScorerRule(scorers, threshold if named is None else named)
