"""How ranks that hold the same batch divide it."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from verl_speculator.engine.sequence_parallel import share_of_sequences, share_of_targets
from verl_speculator.losses import PackedHiddenStates


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


def packed_batch() -> PackedHiddenStates:
    """Sequences of 3, 0, 2 and 4 tokens."""
    states = torch.arange(18.0).view(9, 2)
    return PackedHiddenStates(
        hidden_states=states,
        input_ids=torch.arange(9) + 10,
        loss_mask=torch.tensor([0, 1, 1, 1, 0, 0, 1, 0, 1]),
        cu_seqlens=torch.tensor([0, 3, 3, 5, 9]),
        head_counts=torch.tensor([7]),
        aux_hidden_states=torch.cat([states, -states], dim=1),
        position_ids=torch.tensor([0, 1, 2, 0, 1, 0, 1, 2, 3]),
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_sequences_stay_whole(size: int) -> None:
    """Ranks take turns, and an empty sequence is somebody's turn too."""
    packed = packed_batch()
    shares = [share_of_sequences(packed, rank, size) for rank in range(size)]
    seen = []
    for rank, share in enumerate(shares):
        assert share.num_tokens > 0 or rank == 1, "only the rank whose turn is the empty sequence"
        assert share.cu_seqlens[-1] == share.num_tokens
        assert torch.equal(share.head_counts, packed.head_counts), "of the global batch, however it is divided"
        for start, stop in itertools.pairwise(share.cu_seqlens.tolist()):
            own, first = slice(start, stop), int(share.input_ids[start]) - 10 if stop > start else 0
            there = slice(first, first + stop - start)
            for name in ("hidden_states", "input_ids", "aux_hidden_states", "position_ids"):
                assert torch.equal(getattr(share, name)[own], getattr(packed, name)[there]), name
            assert stop == start or int(share.position_ids[start]) == 0, "sequences are whole"
            if rank < packed.num_sequences:
                seen.append((first, stop - start))
                assert torch.equal(share.loss_mask[own], packed.loss_mask[there])
            else:
                assert not share.loss_mask.any(), "a rank without a sequence of its own trains nothing"
    assert sorted(seen) == [(0, 0), (0, 3), (3, 2), (5, 4)]


def test_gradients_come_back_to_the_sequences_of_a_share() -> None:
    packed = packed_batch()
    states = packed.hidden_states.clone().requires_grad_()
    share_of_sequences(dataclasses.replace(packed, hidden_states=states), 2, 4).hidden_states.sum().backward()
    assert states.grad.sum(dim=1).tolist() == [0, 0, 0, 2, 2, 0, 0, 0, 0]
