"""Causal attention within packed sequences, in memory that grows with the tokens and not with their square.

It works on a block of queries at a time, keeps no weights, and gives the logarithm of the softmax's denominator beside
the output, by which a drafter merges in keys of its own, exactly.

N queries of T tokens, G query heads to each of K key heads, D wide.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 256


class CausalKeys:
    """Which of the T tokens each of N queries sees: those of its sequence up to one, the same for every layer."""

    def __init__(self, last_N: Tensor, starts_N: Tensor) -> None:
        """Queries in the order of `last_N`, the last token each sees; its sequence starts at `starts_N`."""
        self._last_N, self._starts_N = last_N, starts_N
        self._blocks = _blocks(last_N, starts_N)

    def attend(self, query_KGND: Tensor, key_KTD: Tensor, value_KTD: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """The output [K, G, N, D] and the logarithm of the denominator [K, G, N], both with a gradient."""
        return _CausalAttention.apply(
            query_KGND, key_KTD, value_KTD, self._last_N, self._starts_N, self._blocks, scaling
        )


def _blocks(last_N: Tensor, starts_N: Tensor) -> list[tuple[int, int, int, int]]:
    """Queries [a, b) and the keys [first, end) that any of them sees. The host waits for the device once."""
    count = last_N.shape[0]
    bounds = [(a, min(a + BLOCK, count)) for a in range(0, count, BLOCK)]
    if not bounds:
        return []
    firsts, ends = [a for a, _ in bounds], [b - 1 for _, b in bounds]
    keys = torch.stack([starts_N[firsts], last_N[ends] + 1]).tolist()
    return [(a, b, first, end) for (a, b), first, end in zip(bounds, *keys, strict=True)]


class _CausalAttention(torch.autograd.Function):
    """A block of queries at a time; backward computes its weights again."""

    @staticmethod
    def forward(
        ctx: Any,
        query_KGND: Tensor,
        key_KTD: Tensor,
        value_KTD: Tensor,
        last_N: Tensor,
        starts_N: Tensor,
        blocks: list[tuple[int, int, int, int]],
        scaling: float,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(query_KGND.dtype, torch.float32)
        out_KGND = torch.empty_like(query_KGND)
        lse_KGN = query_KGND.new_empty(query_KGND.shape[:-1], dtype=dtype)
        for a, b, first, end in blocks:
            scores = _scores(query_KGND, key_KTD, last_N, starts_N, (a, b, first, end), scaling, dtype)
            lse_KGN[:, :, a:b] = scores.logsumexp(-1)
            weights = (scores - lse_KGN[:, :, a:b, None]).exp_().to(value_KTD.dtype)
            out_KGND[:, :, a:b] = (weights.flatten(1, 2) @ value_KTD[:, first:end]).view_as(out_KGND[:, :, a:b])
        ctx.save_for_backward(query_KGND, key_KTD, value_KTD, out_KGND, lse_KGN, last_N, starts_N)
        ctx.blocks, ctx.scaling = blocks, scaling
        return out_KGND, lse_KGN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, last_N, starts_N = ctx.saved_tensors
        dtype = lse.dtype
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key, dtype=dtype), torch.zeros_like(value, dtype=dtype)
        for a, b, first, end in ctx.blocks:
            at = slice(a, b)
            weights = _scores(query, key, last_N, starts_N, (a, b, first, end), ctx.scaling, dtype)
            weights.sub_(lse[:, :, at, None]).exp_()
            own_out = grad_out[:, :, at].to(dtype)
            grad_value[:, first:end] += weights.flatten(1, 2).mT @ own_out.flatten(1, 2)
            # d/ds of the output is w (g·v - g·out), and of the logarithm w.
            grad_scores = (own_out.flatten(1, 2) @ value[:, first:end].to(dtype).mT).view_as(weights)
            constant = grad_lse[:, :, at, None] - (own_out * out[:, :, at].to(dtype)).sum(-1, keepdim=True)
            grad_scores.add_(constant).mul_(weights).mul_(ctx.scaling)
            grad_query[:, :, at] = (grad_scores.flatten(1, 2) @ key[:, first:end].to(dtype)).view_as(own_out)
            grad_key[:, first:end] += grad_scores.flatten(1, 2).mT @ query[:, :, at].to(dtype).flatten(1, 2)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None, None


def _scores(
    query_KGND: Tensor,
    key_KTD: Tensor,
    last_N: Tensor,
    starts_N: Tensor,
    block: tuple[int, int, int, int],
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """[K, G, b - a, end - first], -inf where a query does not see a key."""
    a, b, first, end = block
    query = query_KGND[:, :, a:b]
    scores = (query.flatten(1, 2) @ key_KTD[:, first:end].mT).view(*query.shape[:-1], end - first).to(dtype) * scaling
    at = torch.arange(first, end, device=last_N.device)
    hidden = (at > last_N[a:b, None]) | (at < starts_N[a:b, None])
    return scores.masked_fill_(hidden, float("-inf"))
