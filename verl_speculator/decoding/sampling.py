"""From logits to the distribution that a token is sampled from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from verl_speculator.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen: `temperature` 0 takes the most likely one, whatever the filters say.

    `top_k` keeps the k most likely tokens (and all that tie with the k-th), 0 all of them; `top_p` keeps the smallest
    set of the most likely tokens whose mass reaches it. Temperature comes first, then `top_k`, then `top_p` on what is
    left, as in vLLM.

    Raises:
        ConfigError: a value out of range; the message begins with its name.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be a number from 0 (greedy) on, not {self.temperature!r}.")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1 (off), not {self.top_p!r}.")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ConfigError(f"top_k must be a positive integer, or 0 to keep all tokens, not {self.top_k!r}.")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """The exact distribution `[..., V]` of the next token: float64 for float64 logits, else float32."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.is_greedy:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        # The largest logit goes first: a tiny temperature would otherwise overflow.
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if 0 < self.top_k < logits.size(-1):
            kth = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, -math.inf)
        probabilities = logits.softmax(-1)
        return probabilities if self.top_p == 1 else _keep_top_p(probabilities, self.top_p)


def _keep_top_p(probabilities: Tensor, top_p: float) -> Tensor:
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    mass_before = ordered.cumsum(-1) - ordered
    kept = ordered.masked_fill(mass_before >= top_p, 0.0)
    kept[..., 0] = ordered[..., 0]
    kept /= kept.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(-1, order, kept)


def sample(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token `[B]` per row of `weights [B, V]`, which need not add up to 1."""
    return torch.multinomial(weights, 1, generator=generator).squeeze(-1)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
