"""What proposes tokens to the target: the protocol, and a speculator behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from verl_speculator.decoding.sampling import SamplingParams, sample
from verl_speculator.errors import ConfigError
from verl_speculator.models import Speculator

DraftSampling = Literal["greedy", "random"]


@dataclass(frozen=True)
class DraftContext:
    """What a drafter may look at: the rows being decoded, after their last token became known."""

    hidden_states: Tensor  # [B, H], the input of lm_head that predicted the last token
    tokens: Tensor  # [B, L] prompt and generated tokens, padded on the left; the last column is the last token
    lengths: Tensor  # [B] how many of the L are tokens and not padding

    @property
    def last_token(self) -> Tensor:
        return self.tokens[:, -1]


@dataclass(frozen=True)
class Draft:
    """Proposed tokens.

    Without `probabilities` the tokens count as certain (a one-hot distribution), which is what greedy drafts and copied
    text are. With them, each token must have been sampled from its own: sampling stays exact only then.
    """

    tokens: Tensor  # [B, k] int64
    lengths: Tensor | None = None  # [B], how many of the k each row proposes; None: all of them
    probabilities: Tensor | None = None  # [B, k, V]


@runtime_checkable
class Drafter(Protocol):
    """Proposes what comes next."""

    @property
    def max_draft_tokens(self) -> int:
        """The most tokens per round that it can propose, and how many it does when nobody says."""
        ...

    def propose(self, context: DraftContext, num_tokens: int, generator: torch.Generator | None) -> Draft:
        """Up to `num_tokens` tokens for each row; a row may get fewer or none."""
        ...


class GreedyDraftHead(Protocol):
    """The part of `Speculator` that greedy drafts need."""

    n_predict: int

    def draft(self, hidden_states: Tensor, last_token: Tensor, num_tokens: int) -> Tensor: ...


class SpeculatorDrafter:
    """A speculator's drafts: its most likely tokens, or tokens sampled from its own distribution.

    Sampled drafts go through the same temperature, top-k and top-p as the target's tokens: a token that the target can
    never say is then seldom drafted. Any other choice would be as exact, but accept less.
    """

    def __init__(self, speculator: GreedyDraftHead, sampling: SamplingParams | None = None) -> None:
        """`sampling` None, or its temperature 0, means greedy drafts.

        Raises:
            ConfigError: sampled drafts of something that has no distribution.
        """
        self.speculator = speculator
        self.sampling = None if sampling is None or sampling.is_greedy else sampling
        if self.sampling and not isinstance(speculator, Speculator):
            raise ConfigError(f'draft_sampling="random" needs a Speculator, and {_name(speculator)} is none.')

    @property
    def max_draft_tokens(self) -> int:
        return self.speculator.n_predict

    def propose(self, context: DraftContext, num_tokens: int, generator: torch.Generator | None) -> Draft:
        if self.sampling is None:
            return Draft(self.speculator.draft(context.hidden_states, context.last_token, num_tokens))
        return self._sampled(context, num_tokens, self.sampling, generator)

    def _sampled(
        self, context: DraftContext, num_tokens: int, sampling: SamplingParams, generator: torch.Generator | None
    ) -> Draft:
        speculator = self.speculator
        assert isinstance(speculator, Speculator)
        state = speculator.begin(context.hidden_states.to(speculator.head_weight(0).dtype))
        token, tokens, probabilities = context.last_token, [], []
        for head_index in range(num_tokens):
            state, output = speculator.step(state, token, head_index)
            distribution = sampling.probabilities(F.linear(output, speculator.head_weight(head_index)))
            token = sample(distribution, generator)
            tokens.append(token)
            probabilities.append(distribution)
        return Draft(torch.stack(tokens, dim=1), probabilities=torch.stack(probabilities, dim=1))


def as_drafter(drafter: GreedyDraftHead | Drafter, sampling: SamplingParams, draft_sampling: DraftSampling) -> Drafter:
    """A drafter as it is, a speculator behind `SpeculatorDrafter`.

    Raises:
        ConfigError: `draft_sampling` is unknown, or asks for sampled drafts of what is no speculator.
    """
    if draft_sampling not in ("greedy", "random"):
        raise ConfigError(f'draft_sampling must be "greedy" or "random", not "{draft_sampling}".')
    if not isinstance(drafter, Drafter):
        return SpeculatorDrafter(drafter, sampling if draft_sampling == "random" else None)
    if draft_sampling == "random" and not isinstance(drafter, SpeculatorDrafter):
        raise ConfigError(f'draft_sampling="random" needs a Speculator, and {_name(drafter)} is none.')
    return drafter


def check_speculator_fits(model: Any, speculator: object) -> None:
    """Refuse a speculator of another base model, as far as sizes can tell; `model` is a Hugging Face causal model.

    Raises:
        ConfigError: the hidden size or the vocabulary differs.
    """
    if isinstance(speculator, Speculator):
        vocab_size, hidden_size = model.get_output_embeddings().weight.shape
        speculator.config.check_fits_base(hidden_size, vocab_size)


def _name(drafter: object) -> str:
    return f"a {type(drafter).__name__}"
