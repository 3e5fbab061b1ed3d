"""Acceptance rules that need no training; all are lossy.

Each is written `NAME` or `NAME:NUMBER[,NUMBER]` on command lines (`parse_rule`). p is the target's distribution at the
slot of a draft d, q the drafter's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from verl_speculator.decoding.acceptance import AcceptanceRule, Verification
from verl_speculator.errors import ConfigError, nearest_name


@dataclass(frozen=True)
class _Rule:
    """What all of them share: nothing is computed but from what verification has."""

    @property
    def needs_draft_logits(self) -> bool:
        return False

    @property
    def target_calls(self) -> int:
        return 0


@dataclass(frozen=True)
class AcceptAll(_Rule):
    """Keeps every draft: the drafter writes, and the target adds a token now and then."""

    def accepts(self, verification: Verification) -> Tensor:
        return torch.ones_like(verification.matches)


@dataclass(frozen=True)
class Random(_Rule):
    """Keeps a mismatch with probability `rate`: what accepting as many blindly would do."""

    rate: float
    seed: int = 0
    _generator: torch.Generator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check("rate", self.rate, 0, 1)
        object.__setattr__(self, "_generator", torch.Generator().manual_seed(self.seed))

    def accepts(self, verification: Verification) -> Tensor:
        drawn = torch.rand(verification.drafts.shape, generator=self._generator)
        return (drawn < self.rate).to(verification.drafts.device)


@dataclass(frozen=True)
class TargetProbability(_Rule):
    """p(d) ≥ `threshold`."""

    threshold: float

    def __post_init__(self) -> None:
        _check("threshold", self.threshold, 0, 1)

    def accepts(self, verification: Verification) -> Tensor:
        return _at_drafts(_probabilities(verification), verification) >= self.threshold


@dataclass(frozen=True)
class TopK(_Rule):
    """d is among the `k` most likely tokens of the target."""

    k: float

    def __post_init__(self) -> None:
        _check("k", self.k, 1, math.inf)

    def accepts(self, verification: Verification) -> Tensor:
        logits = verification.logits[:, :-1]
        return (logits > _at_drafts(logits, verification)[..., None]).sum(-1) < self.k


@dataclass(frozen=True)
class Divergence(_Rule):
    """KL(p ‖ q) ≤ `threshold` nats, but never where the target is surer of its own token than `mask`.

    A divergence as the criterion is that of Sun et al. 2026 (arXiv:2601.04766); the mask is ours to their 0.9.
    """

    threshold: float
    mask: float = 0.9

    def __post_init__(self) -> None:
        _check("threshold", self.threshold, 0, math.inf)
        _check("mask", self.mask, 0, 1)

    @property
    def needs_draft_logits(self) -> bool:
        return True

    def accepts(self, verification: Verification) -> Tensor:
        assert verification.draft_logits is not None
        log_p = verification.logits[:, :-1].float().log_softmax(-1)
        log_q = verification.draft_logits.float().log_softmax(-1)
        # A token that one of them never says: p log p of it is 0, and a q of 0 makes the divergence infinite.
        terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q))
        return (terms.sum(-1) <= self.threshold) & (log_p.amax(-1).exp() <= self.mask)


@dataclass(frozen=True)
class Margin(_Rule):
    """d is the target's second choice, and its logit at least `ratio` of the first's (MARS, arXiv:2601.15498).

    The ratio of logits means something only where they are positive; elsewhere nothing is accepted.
    """

    ratio: float = 0.9

    def __post_init__(self) -> None:
        _check("ratio", self.ratio, 0, 1)

    def accepts(self, verification: Verification) -> Tensor:
        logits = verification.logits[:, :-1].float()
        first, draft = logits.amax(-1), _at_drafts(logits, verification)
        second = (logits > draft[..., None]).sum(-1) <= 1
        return second & (draft > 0) & (draft >= self.ratio * first)


@dataclass(frozen=True)
class EntropyGate(_Rule):
    """The target is undecided, and agrees with what the draft goes on with (FLy, arXiv:2511.22972).

    The entropy of p is at least `threshold` of the largest possible, and the next `window` drafts match, the target
    having read d. Where fewer follow the draft is rejected.
    """

    threshold: float
    window: float = 1

    def __post_init__(self) -> None:
        _check("threshold", self.threshold, 0, 1)
        _check("window", self.window, 0, math.inf)

    def accepts(self, verification: Verification) -> Tensor:
        p = _probabilities(verification)
        entropy = -torch.special.xlogy(p, p).sum(-1) / math.log(p.size(-1))
        agrees = torch.ones_like(verification.matches)
        following = verification.matches & verification.drafted
        for _ in range(int(self.window)):
            following = torch.cat([following[:, 1:], torch.zeros_like(following[:, :1])], dim=1)
            agrees &= following
        return (entropy >= self.threshold) & agrees


# Name, what makes the rule, how many numbers it must and may have, and what they are.
_RULES: dict[str, tuple[Callable[..., AcceptanceRule], int, int, str]] = {
    "accept-all": (AcceptAll, 0, 0, ""),
    "random": (Random, 1, 2, "RATE"),
    "probability": (TargetProbability, 1, 1, "P"),
    "top-k": (TopK, 1, 1, "K"),
    "kl": (Divergence, 1, 2, "NATS[,MASK]"),
    "margin": (Margin, 0, 1, "[RATIO]"),
    "entropy": (EntropyGate, 1, 2, "SHARE[,WINDOW]"),
}
STRICT = "strict"
RULE_FORMS = ", ".join([STRICT, *(f"{name}:{form}" if form else name for name, (*_, form) in _RULES.items())])


def parse_rule(text: str) -> AcceptanceRule | None:
    """The rule that `text` names; None for "strict", which is lossless.

    Raises:
        ConfigError: There is no such rule, or its numbers are wrong.
    """
    name, _, rest = text.partition(":")
    if name == STRICT and not rest:
        return None
    if name not in _RULES:
        near = nearest_name(name, [STRICT, *_RULES])
        raise ConfigError(
            f"{text!r} is no acceptance rule" + (f"; {near!r} is" if near else f"; there are {RULE_FORMS}")
        )
    make, least, most, form = _RULES[name]
    try:
        numbers = [float(part) for part in rest.split(",")] if rest else []
    except ValueError:
        numbers = []
    if not least <= len(numbers) <= most or (rest and not numbers):
        raise ConfigError(f"{text!r}: the rule is written {name}{':' + form if form else ''}")
    if name == "random" and len(numbers) > 1:
        return Random(numbers[0], int(numbers[1]))
    return make(*numbers)


def _check(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{name}={value:g} of an acceptance rule must be from {least} to {most}")


def _probabilities(verification: Verification) -> Tensor:
    return verification.logits[:, :-1].float().softmax(-1)


def _at_drafts(values: Tensor, verification: Verification) -> Tensor:
    """Of `values [B, k, V]` those of the drafts, [B, k]."""
    return values.gather(-1, verification.drafts[..., None]).squeeze(-1)
