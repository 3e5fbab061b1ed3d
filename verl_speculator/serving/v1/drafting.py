"""From a verification step's tensors to the drafts of the whole batch, without leaving the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepInputs:
    """What one step of vLLM's model runner leaves for the proposer.

    `hidden_states` [R, H] are those that were sampled from: one row for each request, or 1 + its number of drafts.
    `rows_end` [B] is the running total of rows, None when every request has one. `num_tokens` are to be drafted, and
    this step verified drafts of `num_drafts` requests. `requests` are the names of all, in the order of rows.
    """

    hidden_states: Tensor
    rows_end: Tensor | None
    num_tokens: int
    num_drafts: int
    requests: list[str]


def last_accepted(sampled: Tensor, rows_end: Tensor | None, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each request's generation stands: `(row, token, accepted)`, each [B].

    They are the row that predicted its last token, that token, and how many drafts were accepted before it.

    `sampled` [B, W] holds each request's accepted tokens and the one after them, then filler (-1). A row without any
    token (its prompt is not complete yet) gives a valid row and token of no meaning: vLLM drops those drafts.
    """
    accepted = ((sampled >= 0) & (sampled < vocab_size)).sum(dim=1)
    last = (accepted - 1).clamp(min=0)
    token = sampled.gather(1, last.unsqueeze(1)).squeeze(1).long().clamp(0, vocab_size - 1)
    if rows_end is None:
        return torch.arange(len(sampled), device=sampled.device), token, last
    first_row = torch.nn.functional.pad(rows_end[:-1], (1, 0)).long()
    return first_row + last, token, last
