"""Drafting with DFlash in `speculative_generate`: one pass a round, in which a block reads the target's states."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from verl_speculator.algorithms.cached_drafter import CachedDrafter, KeysAndValues, appended
from verl_speculator.decoding.drafters import Draft, DraftContext


class DFlashDrafter(CachedDrafter):
    """States that are new wait until `propose`, whose pass turns them into keys and values."""

    def propose(self, context: DraftContext, num_tokens: int, generator: torch.Generator | None) -> Draft:
        last, old, begin = context.last_token, self._width, self._begin()
        slots = torch.arange(old + self._aux.shape[1], device=last.device)
        cache = _Context(self._cache, (slots >= begin) & (slots < old + self._end[:, None]), num_tokens + 1)

        blocks = torch.cat([last[:, None], last.new_full((len(last), num_tokens), self._model.config.mask_token_id)], 1)
        known = self._cached + self._end - self._first
        positions = known[:, None] + torch.arange(num_tokens + 1, device=last.device)
        outputs = self._model.denoise(
            blocks, positions, self._model.fuse(self._aux), (slots[old:] - begin).clamp(min=0), cache
        )
        self._keep(cache.grown)

        logits = self._model.target_logits(outputs[:, 1:])
        rows, width = logits.shape[:2]
        tokens, probabilities = self._choose(logits.flatten(0, 1), generator)
        if probabilities is not None:
            probabilities = probabilities.view(rows, width, -1)
        return Draft(tokens.view(rows, width), probabilities=probabilities)


class _Context:
    """What the layers call in place of attention: the cached context, what is new of it, and the block."""

    def __init__(self, cached: KeysAndValues, is_known: Tensor, block: int) -> None:
        """`is_known` [B, slots] says which slots of the context a row has; all of its block sees them."""
        self._cached = cached
        own = is_known.new_ones(len(is_known), block)
        self._seen = torch.cat([is_known, own], dim=1)[:, None, None].expand(-1, 1, block, -1)
        self.grown: KeysAndValues = {}

    def __call__(
        self, layer: int, context: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        keys, values = self.grown[layer] = appended(self._cached, layer, *context)
        attended = F.scaled_dot_product_attention(
            query,
            torch.cat([keys, key], dim=2),
            torch.cat([values, value], dim=2),
            attn_mask=self._seen,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return attended.transpose(1, 2)
