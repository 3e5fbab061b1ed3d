"""Reference speculative decoding: a speculator drafts, a Hugging Face causal model verifies, the KV cache is kept.

Greedy and lossless: the tokens are those of plain greedy decoding. It exists to measure speculators and to check other
implementations against, so it favours being readable and exact over being fast.

One round feeds `[last token, k drafts]` to the target in one forward. Rows accept different numbers of drafts, so their
caches would differ in length; instead every row keeps the same number of cache slots, and the slots of rejected tokens
are masked out for ever. Position ids are given explicitly, so a token's position never depends on its slot.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from verl_speculator.decoding.metrics import AcceptanceCounts
from verl_speculator.errors import ConfigError, DataError


class Drafter(Protocol):
    """What decoding needs of a speculator. `verl_speculator.models.Speculator` is one."""

    @property
    def n_predict(self) -> int: ...

    def draft(self, hidden_states: Tensor, last_token: Tensor, num_tokens: int) -> Tensor:
        """Greedy drafts `[B, num_tokens]` after `last_token [B]`, which `hidden_states [B, H]` predicted."""
        ...


@dataclass(frozen=True)
class DecodingResult:
    """Generated tokens (the end token included) and what they cost.

    `accepted_per_draft[row]` holds one number per verification round of that row: how many drafts the target agreed
    with. As in vLLM's counters, tokens past the end of the row count when they were verified in its last round.
    """

    tokens: list[list[int]]
    num_target_forwards: int
    num_draft_tokens: int  # drafted per round; 0 for plain decoding
    accepted_per_draft: list[list[int]]

    @property
    def num_drafts(self) -> list[int]:
        """Verification rounds per row."""
        return [len(accepted) if self.num_draft_tokens else 0 for accepted in self.accepted_per_draft]

    @property
    def num_accepted_tokens(self) -> list[int]:
        """Accepted draft tokens per row."""
        return [sum(accepted) for accepted in self.accepted_per_draft]

    @property
    def counts(self) -> AcceptanceCounts:
        if not self.num_draft_tokens:
            return AcceptanceCounts()
        rounds = (length for accepted in self.accepted_per_draft for length in accepted)
        return AcceptanceCounts.from_drafts(rounds, self.num_draft_tokens)

    @property
    def acceptance_length(self) -> float:
        """1 + accepted / drafts, over all rows."""
        return self.counts.acceptance_length


def speculative_generate(
    model: Any,
    speculator: Drafter,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    num_draft_tokens: int | None = None,
    eos_token_id: int | Collection[int] | None = None,
) -> DecodingResult:
    """Decode greedily with drafts of `num_draft_tokens` tokens (all heads, `speculator.n_predict`, when not given).

    `model` is a Hugging Face causal model in eval mode; `input_ids` and `attention_mask` are `[B, S]`, padded on the
    left. Generation of a row ends with `eos_token_id` (one or several) or after `max_new_tokens`.

    Raises `ConfigError` for a number of drafts that the speculator does not have, `DataError` for a padded last column.
    """
    count = speculator.n_predict if num_draft_tokens is None else num_draft_tokens
    if not 1 <= count <= speculator.n_predict:
        raise ConfigError(
            f"num_draft_tokens={count} must be between 1 and the speculator's n_predict={speculator.n_predict}"
        )
    return _decode(model, speculator, count, input_ids, attention_mask, max_new_tokens, eos_token_id)


def greedy_generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    eos_token_id: int | Collection[int] | None = None,
) -> DecodingResult:
    """Plain greedy decoding by the same loop, one token per target forward; arguments as `speculative_generate`."""
    return _decode(model, None, 0, input_ids, attention_mask, max_new_tokens, eos_token_id)


class _Target:
    """The verified model: its decoder's cache and the forwards it was asked for."""

    def __init__(self, model: Any) -> None:
        self.decoder = model.get_decoder()
        self.lm_head = model.get_output_embeddings()
        self.cache: Any = None
        self.num_forwards = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Hidden states `[B, Q, H]` after the final norm; `attention_mask` covers the cache and the new tokens."""
        output = self.decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = output.past_key_values
        self.num_forwards += 1
        return output.last_hidden_state

    def predict(self, hidden_states: Tensor) -> Tensor:
        # Scaling and soft-capping of logits, which some models add after lm_head, keep the order of the logits.
        return self.lm_head(hidden_states).argmax(-1)


class _Batch:
    """The rows still being decoded: one entry per such row in all tensors, `row_ids` says which rows they are."""

    def __init__(self, target: _Target, input_ids: Tensor, attention_mask: Tensor) -> None:
        self.target = target
        self.mask = attention_mask  # [B, cache slots]: 0 for padding and for rejected drafts
        self.row_ids = list(range(input_ids.size(0)))
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        self.hidden = target.forward(input_ids, attention_mask, positions)[:, -1]  # [B, H], predicted last_token
        self.last_token = target.predict(self.hidden)  # [B], not in the cache yet
        self.next_position = positions[:, -1] + 1  # [B], of last_token

    def verify(self, drafts: Tensor) -> tuple[Tensor, Tensor]:
        """Check `drafts [B, k]` in one target forward.

        Returns the target's tokens `[B, k + 1]` and how many drafts `[B]` they confirm: row b has gained its first
        `accepted[b] + 1` tokens.
        """
        offsets = torch.arange(drafts.size(1) + 1, device=drafts.device)
        inputs = torch.cat([self.last_token[:, None], drafts], dim=1)
        mask = torch.cat([self.mask, self.mask.new_ones(inputs.shape)], dim=1)
        hidden = self.target.forward(inputs, mask, self.next_position[:, None] + offsets)
        predictions = self.target.predict(hidden)
        accepted = (drafts == predictions[:, :-1]).long().cumprod(dim=1).sum(dim=1)

        mask[:, -len(offsets) :] = offsets <= accepted[:, None]
        self._set_mask(mask, num_unused=drafts.size(1) - int(accepted.max()))
        rows = torch.arange(len(accepted), device=accepted.device)
        self.hidden = hidden[rows, accepted]
        self.last_token = predictions[rows, accepted]
        self.next_position = self.next_position + accepted + 1
        return predictions, accepted

    def _set_mask(self, mask: Tensor, num_unused: int) -> None:
        # The last slots, rejected in every row, can go: with a single row the cache never holds a rejected token.
        self.mask = mask[:, : mask.size(1) - num_unused]
        if num_unused:
            self.target.cache.crop(self.mask.size(1))

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows (indices into the current batch) only."""
        if len(rows) == len(self.row_ids):
            return
        index = torch.tensor(rows, dtype=torch.long, device=self.mask.device)
        self.target.cache.batch_select_indices(index)
        self.row_ids = [self.row_ids[row] for row in rows]
        self.mask, self.hidden = self.mask[index], self.hidden[index]
        self.last_token, self.next_position = self.last_token[index], self.next_position[index]


@torch.inference_mode()
def _decode(
    model: Any,
    speculator: Drafter | None,
    num_draft_tokens: int,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    eos_token_id: int | Collection[int] | None,
) -> DecodingResult:
    mask = _checked_mask(input_ids, attention_mask, max_new_tokens)
    stop_tokens = _stop_tokens(eos_token_id)
    target = _Target(model)
    batch = _Batch(target, input_ids, mask)
    tokens = [[token] for token in batch.last_token.tolist()]
    accepted_per_draft: list[list[int]] = [[] for _ in tokens]

    def finish_rows() -> None:
        batch.keep(
            [i for i, row in enumerate(batch.row_ids) if not _is_finished(tokens[row], max_new_tokens, stop_tokens)]
        )

    finish_rows()
    while batch.row_ids:
        if speculator is None:
            drafts = batch.last_token.new_empty(len(batch.row_ids), 0)
        else:
            drafts = speculator.draft(batch.hidden, batch.last_token, num_draft_tokens)
        predictions, accepted = batch.verify(drafts)
        for row, predicted, length in zip(batch.row_ids, predictions.tolist(), accepted.tolist(), strict=True):
            tokens[row] = _cut(tokens[row] + predicted[: length + 1], len(tokens[row]), max_new_tokens, stop_tokens)
            accepted_per_draft[row].append(length)
        finish_rows()
    return DecodingResult(tokens, target.num_forwards, num_draft_tokens, accepted_per_draft)


def _cut(tokens: list[int], start: int, max_new_tokens: int, stop_tokens: frozenset[int]) -> list[int]:
    """Drop what follows the limit or the first stop token; those before `start` are known not to stop."""
    tokens = tokens[:max_new_tokens]
    for index in range(start, len(tokens)):
        if tokens[index] in stop_tokens:
            return tokens[: index + 1]
    return tokens


def _is_finished(tokens: list[int], max_new_tokens: int, stop_tokens: frozenset[int]) -> bool:
    return len(tokens) >= max_new_tokens or tokens[-1] in stop_tokens


def _stop_tokens(eos_token_id: int | Collection[int] | None) -> frozenset[int]:
    if eos_token_id is None:
        return frozenset()
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)


def _checked_mask(input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int) -> Tensor:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if input_ids.dim() != 2 or input_ids.size(1) == 0:
        raise DataError(f"input_ids must be [batch, length] with at least one token, got shape {list(input_ids.shape)}")
    if attention_mask is None:
        return torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise DataError(
            f"attention_mask {list(attention_mask.shape)} must have the shape of input_ids {list(input_ids.shape)}"
        )
    if not bool(attention_mask[:, -1].all()):
        raise DataError("prompts must be padded on the left: the last column of attention_mask must be all ones")
    return attention_mask.long()
