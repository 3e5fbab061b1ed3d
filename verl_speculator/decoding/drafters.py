"""What proposes tokens to the target: the protocol, and a speculator behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from verl_speculator.decoding.sampling import SamplingParams, sample
from verl_speculator.errors import ConfigError
from verl_speculator.models import ChainSpeculator

DraftSampling = Literal["greedy", "random"]


@dataclass(frozen=True)
class DraftContext:
    """What a drafter may look at: the rows being decoded, after their last token became known.

    Attributes:
        hidden_states: [B, H], the input of `lm_head` that predicted the last token.
        tokens: [B, L], prompt and generated tokens, padded on the left; the last column is the last token.
        lengths: [B], how many of the L are tokens and not padding.
    """

    hidden_states: Tensor
    tokens: Tensor
    lengths: Tensor

    @property
    def last_token(self) -> Tensor:
        return self.tokens[:, -1]


@dataclass(frozen=True)
class Draft:
    """Proposed tokens.

    Without `probabilities` the tokens count as certain (a one-hot distribution), which is what greedy drafts and copied
    text are. With them, each token must have been sampled from its own: sampling stays exact only then.

    Attributes:
        tokens: [B, k], int64.
        lengths: [B], how many of the k each row proposes; None for all of them.
        probabilities: [B, k, V].
        logits: [B, k, V], what the tokens were chosen from, where a drafter was asked to keep them (`keep_logits`).
            Lossless verification never looks at them.
    """

    tokens: Tensor
    lengths: Tensor | None = None
    probabilities: Tensor | None = None
    logits: Tensor | None = None


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


@runtime_checkable
class StatefulDrafter(Drafter, Protocol):
    """A drafter that keeps something of each row, such as a KV cache, and reads the target's inner layers.

    It is told of every token with the states at the position before it, in the order of the text: by `start` of the
    prompt's, by `advance` of those that a round has added. `select` says which rows go on. One generation at a time.
    """

    @property
    def aux_hidden_state_layer_ids(self) -> Sequence[int]:
        """Whose states these are, side by side. Id i is the residual stream after i layers, in ascending order."""
        ...

    def start(self, tokens: Tensor, lengths: Tensor, aux_hidden_states: Tensor) -> None:
        """Begin with rows of `lengths` [B] tokens at the right end of `tokens` [B, S].

        Args:
            tokens: Those that follow the positions of the prompt, so the last is the first one generated.
            aux_hidden_states: [B, S, A * H] of the positions before.
        """
        ...

    def advance(self, tokens: Tensor, counts: Tensor, aux_hidden_states: Tensor) -> None:
        """Each row has gained the first `counts` [B] of its `tokens` [B, Q]; states [B, Q, A * H] as in `start`."""
        ...

    def select(self, rows: list[int]) -> None:
        """Go on with these rows of the batch, in this order."""
        ...


class GreedyDraftHead(Protocol):
    """The part of `ChainSpeculator` that greedy drafts need."""

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
            ConfigError: Sampled drafts of something that has no distribution.
        """
        self.speculator = speculator
        self.sampling = None if sampling is None or sampling.is_greedy else sampling
        self.keep_logits = False
        if self.sampling and not isinstance(speculator, ChainSpeculator):
            raise _not_random(speculator)

    @property
    def max_draft_tokens(self) -> int:
        return self.speculator.n_predict

    def propose(self, context: DraftContext, num_tokens: int, generator: torch.Generator | None) -> Draft:
        hidden, last, sampling = context.hidden_states, context.last_token, self.sampling
        if sampling is None and not self.keep_logits:
            return Draft(self.speculator.draft(hidden, last, num_tokens))
        all_logits: list[Tensor] = []
        distributions: list[Tensor] = []

        def choose(logits: Tensor) -> Tensor:
            all_logits.append(logits)
            if sampling is None:
                return logits.argmax(-1)
            # Kept for verification, which is exact only with the distribution that a draft was drawn from.
            distributions.append(sampling.probabilities(logits))
            return sample(distributions[-1], generator)

        assert isinstance(self.speculator, ChainSpeculator)
        tokens = self.speculator.draft(hidden, last, num_tokens, choose)
        return Draft(
            tokens,
            probabilities=torch.stack(distributions, dim=1) if distributions else None,
            logits=torch.stack(all_logits, dim=1) if self.keep_logits else None,
        )


def as_drafter(
    drafter: GreedyDraftHead | Drafter,
    sampling: SamplingParams,
    draft_sampling: DraftSampling,
    *,
    keep_logits: bool = False,
) -> Drafter:
    """A drafter as it is, a speculator behind its own (`make_drafter`) or behind `SpeculatorDrafter`.

    Raises:
        ConfigError: `draft_sampling` is unknown, or asks for sampled drafts of what is no speculator; or `keep_logits`
            asks for the logits of a drafter that has none.
    """
    found = _as_drafter(drafter, sampling, draft_sampling)
    if keep_logits:
        if not hasattr(found, "keep_logits") or (
            isinstance(found, SpeculatorDrafter) and not isinstance(found.speculator, ChainSpeculator)
        ):
            raise ConfigError(
                f"the acceptance rule compares with the drafter's own distribution, which a {type(drafter).__name__} "
                "does not give; a chain of heads (mlp, lstm) or a language model does"
            )
        found.keep_logits = True
    return found


def _as_drafter(drafter: GreedyDraftHead | Drafter, sampling: SamplingParams, draft_sampling: DraftSampling) -> Drafter:
    if draft_sampling not in ("greedy", "random"):
        raise ConfigError(f'draft_sampling must be "greedy" or "random", not "{draft_sampling}".')
    if hasattr(drafter, "make_drafter"):
        return drafter.make_drafter(sampling if draft_sampling == "random" else None)
    if not isinstance(drafter, Drafter):
        return SpeculatorDrafter(drafter, sampling if draft_sampling == "random" else None)
    if draft_sampling == "random" and not isinstance(drafter, SpeculatorDrafter):
        raise _not_random(drafter)
    return drafter


def _not_random(drafter: object) -> ConfigError:
    return ConfigError(f'draft_sampling="random" needs a Speculator, and a {type(drafter).__name__} is none.')
