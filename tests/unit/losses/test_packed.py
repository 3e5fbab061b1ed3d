import pytest
import torch

from verl_speculator.errors import DataError
from verl_speculator.losses import PackedHiddenStates


def _parts(num_tokens=5, hidden_size=3):
    return {
        "hidden_states": torch.randn(num_tokens, hidden_size),
        "input_ids": torch.arange(num_tokens),
        "loss_mask": torch.ones(num_tokens),
        "cu_seqlens": torch.tensor([0, num_tokens]),
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_states", torch.randn(1, 5, 3)),
        ("input_ids", torch.arange(4)),
        ("loss_mask", torch.ones(1, 5)),
        ("cu_seqlens", torch.tensor([0.0, 5.0])),
        ("cu_seqlens", torch.tensor([[0, 5]])),
        ("lm_head_weight", torch.randn(7, 4)),
        ("head_counts", torch.tensor(3)),
    ],
)
def test_wrong_shape_is_refused_by_name(name, value):
    with pytest.raises(DataError, match=name):
        PackedHiddenStates(**{**_parts(), name: value})


def test_from_padded_keeps_tokens_in_order_and_drops_padding():
    lengths = [3, 0, 5, 1]
    hidden = torch.randn(4, 5, 2)
    ids = torch.arange(20).view(4, 5)
    mask = torch.randint(0, 2, (4, 5))
    attention = torch.tensor([[1] * n + [0] * (5 - n) for n in lengths])
    packed = PackedHiddenStates.from_padded(hidden, ids, mask, attention)

    assert packed.cu_seqlens.tolist() == [0, 3, 3, 8, 9]
    assert packed.cu_seqlens.dtype == torch.int64
    assert (packed.num_sequences, packed.num_tokens) == (4, 9)
    for padded, flat in ((hidden, packed.hidden_states), (ids, packed.input_ids), (mask, packed.loss_mask)):
        assert torch.equal(flat, torch.cat([padded[b, :n] for b, n in enumerate(lengths)]))
