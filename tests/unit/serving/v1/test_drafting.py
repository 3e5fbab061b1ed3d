"""The rows and tokens to draft from, against the loop over requests that they stand for."""

from __future__ import annotations

import random

import torch

from verl_speculator.serving.v1.drafting import last_accepted

VOCAB = 50


def loop(sampled: list[list[int]], drafts: list[int]) -> list[tuple[int, int, int]]:
    """As vLLM's own Medusa branch does it: request by request, on lists without filler."""
    found, offset = [], 0
    for tokens, count in zip(sampled, drafts, strict=True):
        found.append((offset + len(tokens) - 1, tokens[-1], len(tokens) - 1))
        offset += count + 1
    return found


def test_batches_of_random_drafts_and_acceptance() -> None:
    generator = random.Random(0)
    for _ in range(200):
        drafts = [generator.randrange(0, 5) for _ in range(generator.randrange(1, 7))]
        width = max(drafts) + 1
        sampled = [[generator.randrange(VOCAB) for _ in range(generator.randrange(0, n + 1) + 1)] for n in drafts]
        padded = torch.tensor([row + [-1] * (width - len(row)) for row in sampled], dtype=torch.int32)
        ends = torch.tensor([n + 1 for n in drafts]).cumsum(0).int()
        rows, tokens, accepted = last_accepted(padded, ends, VOCAB)
        assert list(zip(rows.tolist(), tokens.tolist(), accepted.tolist(), strict=True)) == loop(sampled, drafts)


def test_without_drafts_every_request_has_one_row() -> None:
    rows, tokens, accepted = last_accepted(torch.tensor([[4], [9], [0]], dtype=torch.int32), None, VOCAB)
    assert rows.tolist() == [0, 1, 2]
    assert tokens.tolist() == [4, 9, 0]
    assert accepted.tolist() == [0, 0, 0]
    assert tokens.dtype == torch.int64


def test_a_request_without_a_token_gives_something_that_can_be_computed_with() -> None:
    sampled = torch.tensor([[-1, -1, -1], [VOCAB, 3, -1], [5, 6, 7]], dtype=torch.int32)
    rows, tokens, accepted = last_accepted(sampled, torch.tensor([3, 6, 9], dtype=torch.int32), VOCAB)
    assert rows[0] == 0
    assert all(0 <= token < VOCAB for token in tokens.tolist())
    assert (rows.tolist()[2], accepted.tolist()[2]) == (8, 2)
