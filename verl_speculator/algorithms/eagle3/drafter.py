"""Drafting with EAGLE-3 in `speculative_generate`: a step a token, which reads the keys of the drafts before it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from verl_speculator.algorithms.cached_drafter import CachedDrafter, KeysAndValues, appended
from verl_speculator.decoding.drafters import Draft, DraftContext


class Eagle3Drafter(CachedDrafter):
    """Drafts go on from the last entry's state; their keys are not kept, for the target's own states follow."""

    def propose(self, context: DraftContext, num_tokens: int, generator: torch.Generator | None) -> Draft:
        hidden, output = self._take_in()
        tokens: list[Tensor] = []
        distributions: list[Tensor] = []
        keys_and_values = self._cache
        for k in range(num_tokens):
            if k > 0:
                positions = (self._cached + k - 1)[:, None]
                cache = _Cache(keys_and_values, _seen(self._cached + k, self._width + k, 1))
                embeds = self._model.embed_tokens(tokens[-1][:, None])
                hidden, output = self._model.step(embeds, hidden, positions, cache)
                keys_and_values = cache.grown
            drafted, distribution = self._choose(self._model.target_logits(output[:, 0]), generator)
            tokens.append(drafted)
            if distribution is not None:
                distributions.append(distribution)
        probabilities = torch.stack(distributions, dim=1) if distributions else None
        return Draft(torch.stack(tokens, dim=1), probabilities=probabilities)

    def _take_in(self) -> tuple[Tensor, Tensor]:
        """Run the entries that wait and cache their keys; the last one's state and output, [B, 1, H] each."""
        old, count, begin = self._width, self._tokens.shape[1], self._begin()
        slots = torch.arange(old, old + count, device=self._tokens.device)
        positions = (slots - begin).clamp(min=0)
        every = torch.arange(old + count, device=self._tokens.device)
        seen = (every >= begin[:, None]) & (every <= slots[:, None])
        # Slots that are nobody's look at themselves: attention to nothing would be no number.
        seen = seen | (every == slots[:, None])
        cache = _Cache(self._cache, seen)
        embeds, fused = self._model.embed_tokens(self._tokens), self._model.fuse(self._aux)
        hidden, output = self._model.step(embeds, fused, positions, cache)
        self._keep(cache.grown)
        rows = torch.arange(len(self._end), device=self._end.device)
        last = self._end - 1
        return hidden[rows, last][:, None], output[rows, last][:, None]


def _seen(lengths: Tensor, width: int, queries: int) -> Tensor:
    """[B, queries, width], bool: the last `lengths` [B] slots."""
    slots = torch.arange(width, device=lengths.device)
    return (slots >= width - lengths[:, None, None]).expand(-1, queries, -1)


class _Cache:
    """What the layers call in place of attention: new keys join the cached ones, under a mask [B, N, all]."""

    def __init__(self, cached: KeysAndValues, seen: Tensor) -> None:
        self._cached = cached
        self._seen = seen.unsqueeze(1)
        self.grown: KeysAndValues = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        key, value = self.grown[layer] = appended(self._cached, layer, key, value)
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=self._seen, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return attended.transpose(1, 2)
