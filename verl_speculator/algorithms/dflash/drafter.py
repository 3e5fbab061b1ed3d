"""Drafting with DFlash in `speculative_generate`: keys and values of the target's states, and one pass a round.

B rows; a row's slots lie side by side and end where all rows' do, as in the target's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from verl_speculator.decoding.drafters import Draft, DraftContext
from verl_speculator.decoding.sampling import SamplingParams, sample
from verl_speculator.decoding.target import keep_slots

if TYPE_CHECKING:
    from verl_speculator.algorithms.dflash.model import DFlashSpeculator

KeysAndValues = dict[int, tuple[Tensor, Tensor]]


class DFlashDrafter:
    """A `StatefulDrafter`; states that are new wait until `propose`, whose pass turns them into keys and values."""

    # Cached slots of each row [B]; the states that wait [B, Q, layers * H], and which of them are the row's.
    _cached: Tensor
    _aux: Tensor
    _first: Tensor
    _end: Tensor

    def __init__(self, model: DFlashSpeculator, sampling: SamplingParams | None = None) -> None:
        """`sampling` None, or its temperature 0, means greedy drafts."""
        self._model = model
        self._sampling = None if sampling is None or sampling.is_greedy else sampling
        self._cache: KeysAndValues = {}

    @property
    def max_draft_tokens(self) -> int:
        return self._model.n_predict

    @property
    def aux_hidden_state_layer_ids(self) -> Sequence[int]:
        return self._model.target_layer_ids

    def start(self, tokens: Tensor, lengths: Tensor, aux_hidden_states: Tensor) -> None:
        self._cache = {}
        self._cached = torch.zeros_like(lengths)
        self._wait(tokens.shape[1] - lengths, torch.full_like(lengths, tokens.shape[1]), aux_hidden_states)

    def advance(self, tokens: Tensor, counts: Tensor, aux_hidden_states: Tensor) -> None:
        self._wait(torch.zeros_like(counts), counts, aux_hidden_states)

    def select(self, rows: list[int]) -> None:
        if len(rows) == self._cached.shape[0]:
            return
        at = torch.tensor(rows, device=self._cached.device, dtype=torch.long)
        self._cache = {layer: (keys[at], values[at]) for layer, (keys, values) in self._cache.items()}
        self._cached, self._aux = self._cached[at], self._aux[at]
        self._first, self._end = self._first[at], self._end[at]

    def propose(self, context: DraftContext, num_tokens: int, generator: torch.Generator | None) -> Draft:
        last = context.last_token
        old = self._cache[0][0].shape[2] if self._cache else 0
        slots = torch.arange(old + self._aux.shape[1], device=last.device)
        # A row's slots begin here; what stands before them, or after the row's last state, is nobody's.
        begin = (old - self._cached if old else self._first)[:, None]
        cache = _Context(self._cache, (slots >= begin) & (slots < old + self._end[:, None]), num_tokens + 1)

        blocks = torch.cat([last[:, None], last.new_full((len(last), num_tokens), self._model.config.mask_token_id)], 1)
        known = self._cached + self._end - self._first
        positions = known[:, None] + torch.arange(num_tokens + 1, device=last.device)
        outputs = self._model.denoise(
            blocks, positions, self._model.fuse(self._aux), (slots[old:] - begin).clamp(min=0), cache
        )
        self._keep(cache.grown, known, old + self._end)

        logits = self._model.target_logits(outputs[:, 1:])
        if self._sampling is None:
            return Draft(logits.argmax(-1))
        # Kept for verification, which is exact only with the distribution that a draft was drawn from.
        rows, width = logits.shape[:2]
        probabilities = self._sampling.probabilities(logits.flatten(0, 1))
        drawn = sample(probabilities, generator)
        return Draft(drawn.view(rows, width), probabilities=probabilities.view(rows, width, -1))

    def _wait(self, first: Tensor, end: Tensor, aux_hidden_states: Tensor) -> None:
        self._first, self._end = first, end
        self._aux = aux_hidden_states.to(self._model.fc.weight.dtype)

    def _keep(self, grown: KeysAndValues, known: Tensor, ends: Tensor) -> None:
        """Of each row the `known` slots before its `ends`, [B] each."""
        width, row_ends = int(known.max()), ends.tolist()
        rows = list(range(len(row_ends)))
        self._cached = known
        self._cache = {
            layer: (keep_slots(keys, rows, row_ends, width, dim=2), keep_slots(values, rows, row_ends, width, dim=2))
            for layer, (keys, values) in grown.items()
        }


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
        if layer in self._cached:
            old_keys, old_values = self._cached[layer]
            context = (torch.cat([old_keys, context[0]], dim=2), torch.cat([old_values, context[1]], dim=2))
        self.grown[layer] = context
        attended = F.scaled_dot_product_attention(
            query,
            torch.cat([context[0], key], dim=2),
            torch.cat([context[1], value], dim=2),
            attn_mask=self._seen,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return attended.transpose(1, 2)
