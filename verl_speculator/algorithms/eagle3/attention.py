"""The attention of EAGLE-3's training-time test.

Step 0 is causal attention within each sequence. Step k, at a position, sees what step 0 does there and the keys that
steps 1 to k have at this very position: the drafts that would precede it in decoding. So the causal part needs step 0's
keys alone, and the few others are merged into its softmax.

N queries of T tokens, G query heads to each of K key heads, D wide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verl_speculator.algorithms.attention import CausalKeys


class TrainingTimeAttention:
    """What the decoder layers call in place of attention, once a layer and step.

    Steps after the first may run on fewer rows: `next_step` says on which of those before, and where these are.
    """

    def __init__(self, starts_T: Tensor) -> None:
        """`starts_T` is where each token's sequence starts, in the packed batch."""
        self._starts_T = starts_T
        self._seen = CausalKeys(torch.arange(starts_T.shape[0], device=starts_T.device), starts_T)
        self._causal: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def next_step(self, kept: Tensor, rows_N: Tensor) -> None:
        """Go on with the rows `kept` of those of this step, which are the positions `rows_N` of the batch."""
        self._seen = CausalKeys(rows_N, self._starts_T[rows_N])
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
        out_KGND, lse_KGN = self._seen.attend(query_KGND, *self._causal[layer], scaling)
        own = self._own[layer]
        if own:
            scores = [(query_KGND * own_key[:, None]).sum(-1).to(lse_KGN.dtype) * scaling for own_key, _ in own]
            values_KNMD = torch.stack([own_value for _, own_value in own], dim=2)
            weights_KGNM = torch.stack([lse_KGN, *scores], dim=-1).softmax(dim=-1)
            merged = weights_KGNM[..., :1] * out_KGND.to(lse_KGN.dtype)
            merged = merged + (weights_KGNM[..., None, 1:] @ values_KNMD[:, None].to(lse_KGN.dtype)).squeeze(-2)
            out_KGND = merged.to(out_KGND.dtype)
        return out_KGND.flatten(0, 1).transpose(0, 1)[None]
