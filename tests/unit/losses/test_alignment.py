import pytest
import torch

from verl_speculator.losses import count_trained_positions, head_inputs, head_targets, trained_positions


def _trained_by_hand(mask, lengths, n_predict):
    expected = torch.zeros(n_predict, sum(lengths), dtype=torch.bool)
    start = 0
    for length in lengths:
        for t in range(length):
            for i in range(n_predict):
                if t + 2 + i < length and mask[start + t + 2 + i] == 1:
                    expected[i, start + t] = True
        start += length
    return expected


@pytest.mark.parametrize("lengths", [[7], [4, 9, 6], [1, 2, 3, 4, 5], [0, 5, 0, 0, 3, 0], [1], [0]])
@pytest.mark.parametrize("kind", ["none", "all", "one", "random"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_trained_positions_match_a_loop(lengths, kind, dtype):
    total = sum(lengths)
    mask = {
        "none": torch.zeros(total),
        "all": torch.ones(total),
        "one": (torch.arange(total) == total - 1).float(),
        "random": torch.randint(0, 2, (total,), generator=torch.Generator().manual_seed(3)).float(),
    }[kind]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    expected = _trained_by_hand(mask, lengths, 3)
    assert torch.equal(trained_positions(mask.to(dtype), cu_seqlens, 3), expected)
    assert count_trained_positions(mask.to(dtype), cu_seqlens.int(), 3).tolist() == expected.sum(1).tolist()


def test_head_reads_one_after_the_predicted_token_and_predicts_the_next():
    ids = torch.arange(100, 110)
    positions = torch.tensor([0, 4, 9])
    assert head_inputs(ids, positions, 0).tolist() == [101, 105, 109]
    assert head_targets(ids, positions, 0).tolist() == [102, 106, 109]
    assert head_inputs(ids, positions, 2).tolist() == [103, 107, 109]
    assert head_targets(ids, positions, 2).tolist() == [104, 108, 109]
