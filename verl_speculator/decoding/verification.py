"""Which drafts the target keeps, and the token that follows them.

Sampled verification is that of Leviathan et al. 2023 (arXiv:2211.17192) and Chen et al. 2023 (arXiv:2302.01318): what
is kept has exactly the target's distribution, whatever was drafted. docs/maths.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from verl_speculator.decoding.drafters import Draft
from verl_speculator.decoding.sampling import SamplingParams, sample


def verify(
    draft: Draft,
    logits: Tensor,
    sampling: SamplingParams,
    generator: torch.Generator | None,
    relax: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compare drafts of k tokens with the target's `logits [B, k + 1, V]`, the i-th of which follow i drafts.

    `relax` makes it lossy: from the drafts that are kept losslessly, `[B, k]` bool, it says which to keep instead.

    Returns tokens `[B, k + 1]` and the number of accepted drafts `[B]`: row b has gained its first `accepted[b] + 1`
    tokens, the last of which is the target's own.
    """
    if not sampling.is_greedy:
        return _verify_sampled(draft, sampling.probabilities(logits), generator, relax)
    predictions = logits.argmax(-1)
    keep = draft.tokens == predictions[:, :-1]
    if relax is not None:
        keep = relax(keep)
        predictions = torch.cat([torch.where(keep, draft.tokens, predictions[:, :-1]), predictions[:, -1:]], dim=1)
    return predictions, _accepted_prefix(keep, draft.lengths)


def _verify_sampled(
    draft: Draft, target: Tensor, generator: torch.Generator | None, relax: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor]:
    batch, num_drafts = draft.tokens.shape
    chance = acceptance_probability(draft, target[:, :-1])
    uniform = torch.rand(chance.shape, generator=generator, dtype=chance.dtype, device=chance.device)
    keep = uniform < chance
    accepted = _accepted_prefix(keep if relax is None else relax(keep), draft.lengths)

    rows = torch.arange(batch, device=accepted.device)
    distribution = target[rows, accepted]
    if num_drafts:
        lengths = num_drafts if draft.lengths is None else draft.lengths
        place = accepted.clamp(max=num_drafts - 1)  # of the rejected draft, in rows that have one
        rest = residual(distribution, draft.tokens[rows, place], _at(draft.probabilities, rows, place))
        distribution = torch.where((accepted < lengths)[:, None], rest, distribution)
    tokens = torch.cat([draft.tokens, draft.tokens.new_zeros(batch, 1)], dim=1)
    tokens[rows, accepted] = sample(distribution, generator)
    return tokens, accepted


def acceptance_probability(draft: Draft, target: Tensor) -> Tensor:
    """min(1, p/q) of each drafted token `[B, k]` under the target's `[B, k, V]`; q is 1 for a certain draft."""
    p = target.gather(-1, draft.tokens[..., None]).squeeze(-1)
    if draft.probabilities is None:
        return p
    q = draft.probabilities.gather(-1, draft.tokens[..., None]).squeeze(-1)
    return (p / q).clamp(max=1.0)


def residual(target: Tensor, token: Tensor, draft: Tensor | None) -> Tensor:
    """(p - q)₊ `[B, V]`, not normalised, for rejected tokens `[B]`; `draft` None is one-hot at the token."""
    rest = target.scatter(-1, token[:, None], 0.0) if draft is None else (target - draft).clamp(min=0.0)
    # Where p is q nothing is left but rounding, and a rejection is itself an event of rounding.
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, target)


def _accepted_prefix(matches: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is not None:
        matches = matches & (torch.arange(matches.size(1), device=matches.device) < lengths[:, None])
    return matches.long().cumprod(dim=1).sum(dim=1)


def _at(values: Tensor | None, rows: Tensor, place: Tensor) -> Tensor | None:
    return None if values is None else values[rows, place]
