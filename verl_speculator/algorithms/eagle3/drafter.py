"""Drafting with EAGLE-3 in `speculative_generate`: the model's KV cache beside the target's.

The cache holds the entries of known positions only, made of the target's own states. The keys of drafts are dropped
when a round ends, for the target's states at their positions are then known, or they were rejected.

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
    from verl_speculator.algorithms.eagle3.model import Eagle3Speculator

KeysAndValues = dict[int, tuple[Tensor, Tensor]]


class Eagle3Drafter:
    """A `StatefulDrafter`; new entries wait until `propose` needs them, and then run in one forward pass."""

    # Cached entries of each row [B]; and those that wait: tokens [B, Q], states [B, Q, A * H], and which slots of them.
    _cached: Tensor
    _tokens: Tensor
    _aux: Tensor
    _first: Tensor
    _end: Tensor

    def __init__(self, model: Eagle3Speculator, sampling: SamplingParams | None = None) -> None:
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
        self._wait(
            tokens, tokens.shape[1] - lengths, lengths.new_full(lengths.shape, tokens.shape[1]), aux_hidden_states
        )

    def advance(self, tokens: Tensor, counts: Tensor, aux_hidden_states: Tensor) -> None:
        self._wait(tokens, torch.zeros_like(counts), counts, aux_hidden_states)

    def select(self, rows: list[int]) -> None:
        if len(rows) == self._cached.shape[0]:
            return
        at = torch.tensor(rows, device=self._cached.device, dtype=torch.long)
        self._cache = {layer: (keys[at], values[at]) for layer, (keys, values) in self._cache.items()}
        self._cached, self._first, self._end = self._cached[at], self._first[at], self._end[at]
        self._tokens, self._aux = self._tokens[at], self._aux[at]

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
            logits = self._model.target_logits(output[:, 0])
            if self._sampling is None:
                tokens.append(logits.argmax(-1))
            else:
                # Kept for verification, which is exact only with the distribution that a draft was drawn from.
                distributions.append(self._sampling.probabilities(logits))
                tokens.append(sample(distributions[-1], generator))
        probabilities = torch.stack(distributions, dim=1) if distributions else None
        return Draft(torch.stack(tokens, dim=1), probabilities=probabilities)

    @property
    def _width(self) -> int:
        return self._cache[0][0].shape[2]

    def _wait(self, tokens: Tensor, first: Tensor, end: Tensor, aux_hidden_states: Tensor) -> None:
        """Entries to take in: of each row those from `first` [B] up to `end` [B]."""
        self._tokens, self._first, self._end = tokens, first, end
        self._aux = aux_hidden_states.to(self._model.fc.weight.dtype)

    def _take_in(self) -> tuple[Tensor, Tensor]:
        """Run the entries that wait and cache their keys; the last one's state and output, [B, 1, H] each."""
        count = self._tokens.shape[1]
        old = self._cache[0][0].shape[2] if self._cache else 0
        slots = torch.arange(old, old + count, device=self._tokens.device)
        # A row's slots begin here; what stands before them, or after the row's last entry, is nobody's.
        begin = old - self._cached if old else self._first
        positions = (slots - begin[:, None]).clamp(min=0)
        every = torch.arange(old + count, device=self._tokens.device)
        seen = (every >= begin[:, None, None]) & (every <= slots[:, None])
        # Slots that are nobody's look at themselves: attention to nothing would be no number.
        seen = seen | (every == slots[:, None])
        cache = _Cache(self._cache, seen)
        embeds, fused = self._model.embed_tokens(self._tokens), self._model.fuse(self._aux)
        hidden, output = self._model.step(embeds, fused, positions, cache)

        self._cached = self._cached + self._end - self._first
        rows = torch.arange(len(self._end), device=self._end.device)
        last = self._end - 1
        width, ends = int(self._cached.max()), (old + self._end).tolist()
        everyone = list(range(len(ends)))
        self._cache = {
            layer: (
                keep_slots(keys, everyone, ends, width, dim=2),
                keep_slots(values, everyone, ends, width, dim=2),
            )
            for layer, (keys, values) in cache.grown.items()
        }
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
        if layer in self._cached:
            old_key, old_value = self._cached[layer]
            key, value = torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)
        self.grown[layer] = (key, value)
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=self._seen, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return attended.transpose(1, 2)
