"""The attention of EAGLE-3's training-time test, in memory that grows with the tokens and not with their square.

Step 0 is causal attention within each sequence. Step k, at a position, sees what step 0 does there and the keys that
steps 1 to k have at this very position: the drafts that would precede it in decoding. So the causal part needs step 0's
keys alone, and the few others are merged into its softmax by the logarithm of its denominator, which is exact.

N queries of T tokens, G query heads to each of K key heads, D wide.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 256


class TrainingTimeAttention:
    """What the decoder layers call in place of attention, once a layer and step.

    Steps after the first may run on fewer rows: `next_step` says on which of those before, and where these are.
    """

    def __init__(self, starts_T: Tensor) -> None:
        """`starts_T` is where each token's sequence starts, in the packed batch."""
        self._starts_T = starts_T
        self._rows_N = torch.arange(starts_T.shape[0], device=starts_T.device)
        self._causal: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._blocks = _blocks(self._rows_N, starts_T)

    def next_step(self, kept: Tensor, rows_N: Tensor) -> None:
        """Go on with the rows `kept` of those of this step, which are the positions `rows_N` of the batch."""
        self._rows_N = rows_N
        self._blocks = _blocks(rows_N, self._starts_T)
        for layer, pairs in self._own.items():
            self._own[layer] = [(key[:, kept], value[:, kept]) for key, value in pairs]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attend [1, heads, N, D] to what this step sees: [1, N, heads, D]."""
        key_KND, value_KND = key[0], value[0]
        query_KGND = query[0].unflatten(0, (key_KND.shape[0], -1))
        if layer not in self._causal:
            self._causal[layer] = (key_KND, value_KND)
            self._own[layer] = []
        else:
            self._own[layer].append((key_KND, value_KND))
        starts_N = self._starts_T[self._rows_N]
        out_KGND, lse_KGN = _CausalAttention.apply(
            query_KGND, *self._causal[layer], self._rows_N, starts_N, self._blocks, scaling
        )
        return (
            merge_own_keys(out_KGND, lse_KGN, query_KGND, self._own[layer], scaling).flatten(0, 1).transpose(0, 1)[None]
        )


def merge_own_keys(
    out_KGND: Tensor, lse_KGN: Tensor, query_KGND: Tensor, own: list[tuple[Tensor, Tensor]], scaling: float
) -> Tensor:
    """Attention over more keys: one of each pair [K, N, D] for each query, beside those that gave `out` and `lse`."""
    if not own:
        return out_KGND
    dtype = lse_KGN.dtype
    scores = [(query_KGND * key[:, None]).sum(-1).to(dtype) * scaling for key, _ in own]
    weights = torch.stack([lse_KGN, *scores]).softmax(dim=0).unsqueeze(-1)
    merged = weights[0] * out_KGND.to(dtype)
    for weight, (_, value) in zip(weights[1:], own, strict=True):
        merged = merged + weight * value[:, None].to(dtype)
    return merged.to(out_KGND.dtype)


def _blocks(rows_N: Tensor, starts_T: Tensor) -> list[tuple[int, int, int, int]]:
    """Queries [a, b) and the keys [first, end) that any of them sees. The host waits for the device once."""
    count = rows_N.shape[0]
    bounds = [(a, min(a + BLOCK, count)) for a in range(0, count, BLOCK)]
    if not bounds:
        return []
    firsts, ends = [a for a, _ in bounds], [b - 1 for _, b in bounds]
    keys = torch.stack([starts_T[rows_N[firsts]], rows_N[ends] + 1]).tolist()
    return [(a, b, first, end) for (a, b), first, end in zip(bounds, *keys, strict=True)]


class _CausalAttention(torch.autograd.Function):
    """Softmax attention within sequences and its logarithm of the denominator, both with a gradient.

    It works on a block of queries at a time and keeps no weights: backward computes them again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_KGND: Tensor,
        key_KTD: Tensor,
        value_KTD: Tensor,
        rows_N: Tensor,
        starts_N: Tensor,
        blocks: list[tuple[int, int, int, int]],
        scaling: float,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(query_KGND.dtype, torch.float32)
        out_KGND = torch.empty_like(query_KGND)
        lse_KGN = query_KGND.new_empty(query_KGND.shape[:-1], dtype=dtype)
        for a, b, first, end in blocks:
            scores = _scores(query_KGND, key_KTD, rows_N, starts_N, (a, b, first, end), scaling, dtype)
            lse_KGN[:, :, a:b] = scores.logsumexp(-1)
            weights = (scores - lse_KGN[:, :, a:b, None]).exp_().to(value_KTD.dtype)
            out_KGND[:, :, a:b] = (weights.flatten(1, 2) @ value_KTD[:, first:end]).view_as(out_KGND[:, :, a:b])
        ctx.save_for_backward(query_KGND, key_KTD, value_KTD, out_KGND, lse_KGN, rows_N, starts_N)
        ctx.blocks, ctx.scaling = blocks, scaling
        return out_KGND, lse_KGN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, rows_N, starts_N = ctx.saved_tensors
        dtype = lse.dtype
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key, dtype=dtype), torch.zeros_like(value, dtype=dtype)
        for a, b, first, end in ctx.blocks:
            at = slice(a, b)
            weights = _scores(query, key, rows_N, starts_N, (a, b, first, end), ctx.scaling, dtype)
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
    rows_N: Tensor,
    starts_N: Tensor,
    block: tuple[int, int, int, int],
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """[K, G, b - a, end - first], -inf where a query does not see a key."""
    a, b, first, end = block
    query = query_KGND[:, :, a:b]
    scores = (query.flatten(1, 2) @ key_KTD[:, first:end].mT).view(*query.shape[:-1], end - first).to(dtype) * scaling
    at = torch.arange(first, end, device=rows_N.device)
    hidden = (at > rows_N[a:b, None]) | (at < starts_N[a:b, None])
    return scores.masked_fill_(hidden, float("-inf"))
