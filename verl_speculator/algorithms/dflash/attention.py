"""The attention of DFlash in training: a block sees the base's states before its anchor, and all of itself.

A blocks of S tokens each; N = A * S queries of T tokens, G query heads to each of K key heads, D wide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verl_speculator.algorithms.attention import CausalKeys


class BlockAttention:
    """What a decoder layer calls in place of attention, with the keys and values of its context."""

    def __init__(self, anchors_A: Tensor, starts_T: Tensor, block_size: int) -> None:
        """Blocks begin at the positions `anchors_A`, ascending; each token's sequence starts at `starts_T`."""
        anchors_N = anchors_A.repeat_interleave(block_size)
        self._seen = CausalKeys(anchors_N - 1, starts_T[anchors_N])
        self._block_size = block_size

    def __call__(
        self, layer: int, context: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """[1, N, heads, D] from a context [1, K, T, D] and blocks [1, heads, N, D]."""
        key_KND, value_KND = key[0], value[0]
        query_KGND = query[0].unflatten(0, (key_KND.shape[0], -1))
        out_KGND, lse_KGN = self._seen.attend(query_KGND, context[0][0], context[1][0], scaling)
        # Within its block every query has the same S keys.
        query_KGASD = query_KGND.unflatten(2, (-1, self._block_size))
        key_KASD, value_KASD = (tensor.unflatten(1, (-1, self._block_size)) for tensor in (key_KND, value_KND))
        scores_KGASS = (query_KGASD @ key_KASD[:, None].mT).to(lse_KGN.dtype) * scaling
        weights = torch.cat([lse_KGN.unflatten(2, (-1, self._block_size)).unsqueeze(-1), scores_KGASS], dim=-1)
        weights = weights.softmax(dim=-1)
        merged = weights[..., :1] * out_KGND.to(weights.dtype).unflatten(2, (-1, self._block_size))
        merged = merged + weights[..., 1:] @ value_KASD[:, None].to(weights.dtype)
        return merged.to(out_KGND.dtype).flatten(2, 3).flatten(0, 1).transpose(0, 1)[None]
