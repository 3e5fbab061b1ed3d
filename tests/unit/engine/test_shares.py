"""How ranks that hold the same batch divide it."""

from __future__ import annotations

import itertools

import pytest
import torch

from verl_speculator.engine.hidden_states import share_of_sequences, share_of_targets


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_every_rank_has_as_many_trained_tokens(size: int, dtype: torch.dtype) -> None:
    """However long the prompts are: a share is counted in tokens that train something."""
    mask = torch.tensor([0] * 20 + [1, 1, 0, 1] * 4 + [0, 0, 1], dtype=dtype)
    shares = torch.stack([share_of_targets(mask, rank, size) for rank in range(size)])
    assert torch.equal(shares.sum(dim=0), mask)
    assert shares.dtype == dtype
    counts = shares.sum(dim=1)
    assert counts.max() - counts.min() <= 1
    positions = [share.nonzero().flatten().tolist() for share in shares]
    assert list(itertools.chain(*positions)) == mask.nonzero().flatten().tolist(), "shares follow one another"


@pytest.mark.parametrize("mask", [torch.zeros(5), torch.zeros(0), torch.tensor([0, 1, 0])])
def test_ranks_may_have_nothing(mask: torch.Tensor) -> None:
    shares = [share_of_targets(mask, rank, 4) for rank in range(4)]
    assert torch.equal(torch.stack(shares).sum(dim=0), mask)


def test_sequences_stay_whole() -> None:
    """Sequences of 3, 0, 2 and 4 tokens: ranks take turns, and an empty one is somebody's turn too."""
    mask = torch.tensor([0, 1, 1, 1, 0, 0, 1, 0, 1])
    cu_seqlens = torch.tensor([0, 3, 3, 5, 9])
    first, second = (share_of_sequences(mask, cu_seqlens, rank, 2) for rank in range(2))
    assert first.tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 0]
    assert second.tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 1]
