"""What drafters with a KV cache of their own share in `speculative_generate`: the cache beside the target's.

The cache holds entries of known positions only, made of the target's own states; what a round adds for its drafts is
dropped when the round ends. B rows; a row's slots lie side by side and end where all rows' do, as in the target's
cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from verl_speculator.algorithms.transformer import TransformerSpeculator
from verl_speculator.decoding.drafters import Draft, DraftContext
from verl_speculator.decoding.sampling import SamplingParams, sample
from verl_speculator.decoding.target import keep_slots

KeysAndValues = dict[int, tuple[Tensor, Tensor]]


class CachedDrafter(ABC):
    """A `StatefulDrafter`; new entries wait until `propose` needs them, and then run in one forward pass."""

    # Cached entries of each row [B]; and those that wait: tokens [B, Q], states [B, Q, layers * H], and the row's are
    # those from `first` [B] up to `end` [B].
    _cached: Tensor
    _tokens: Tensor
    _aux: Tensor
    _first: Tensor
    _end: Tensor

    def __init__(self, model: TransformerSpeculator, sampling: SamplingParams | None = None) -> None:
        """`sampling` None, or its temperature 0, means greedy drafts."""
        self._model: Any = model
        self._sampling = None if sampling is None or sampling.is_greedy else sampling
        self._cache: KeysAndValues = {}

    @property
    def max_draft_tokens(self) -> int:
        return self._model.n_predict

    @property
    def aux_hidden_state_layer_ids(self) -> Sequence[int]:
        return self._model.target_layer_ids

    @abstractmethod
    def propose(self, context: DraftContext, num_tokens: int, generator: torch.Generator | None) -> Draft:
        """Take in what waits, and draft."""

    def start(self, tokens: Tensor, lengths: Tensor, aux_hidden_states: Tensor) -> None:
        self._cache = {}
        self._cached = torch.zeros_like(lengths)
        end = torch.full_like(lengths, tokens.shape[1])
        self._wait(tokens, end - lengths, end, aux_hidden_states)

    def advance(self, tokens: Tensor, counts: Tensor, aux_hidden_states: Tensor) -> None:
        self._wait(tokens, torch.zeros_like(counts), counts, aux_hidden_states)

    def select(self, rows: list[int]) -> None:
        if len(rows) == self._cached.shape[0]:
            return
        at = torch.tensor(rows, device=self._cached.device, dtype=torch.long)
        self._cache = {layer: (keys[at], values[at]) for layer, (keys, values) in self._cache.items()}
        self._cached, self._first, self._end = self._cached[at], self._first[at], self._end[at]
        self._tokens, self._aux = self._tokens[at], self._aux[at]

    def _wait(self, tokens: Tensor, first: Tensor, end: Tensor, aux_hidden_states: Tensor) -> None:
        self._tokens, self._first, self._end = tokens, first, end
        self._aux = aux_hidden_states.to(self._model.fc.weight.dtype)

    @property
    def _width(self) -> int:
        return self._cache[0][0].shape[2] if self._cache else 0

    def _begin(self) -> Tensor:
        """[B, 1], a row's first slot; what stands before it, or after the row's last entry, is nobody's."""
        return (self._width - self._cached if self._cache else self._first)[:, None]

    def _keep(self, grown: KeysAndValues) -> None:
        """Cache what waited: of each row, in `grown`, all that is known of it now."""
        ends, rows = (self._width + self._end).tolist(), list(range(len(self._end)))
        self._cached = self._cached + self._end - self._first
        width = int(self._cached.max())
        self._cache = {
            layer: (keep_slots(keys, rows, ends, width, dim=2), keep_slots(values, rows, ends, width, dim=2))
            for layer, (keys, values) in grown.items()
        }

    def _choose(self, logits: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        """Tokens [N] of logits [N, V]; and, if they were drawn, the distributions, which exact verification needs."""
        if self._sampling is None:
            return logits.argmax(-1), None
        probabilities = self._sampling.probabilities(logits)
        return sample(probabilities, generator), probabilities


def appended(cached: KeysAndValues, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's cached keys and values with new ones behind them."""
    if layer not in cached:
        return key, value
    keys, values = cached[layer]
    return torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
