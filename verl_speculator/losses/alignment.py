"""Which token each draft head reads and predicts, on sequences packed end to end.

The hidden state of position t predicts token t + 1. Head i (from 0) at position t reads token t + 1 + i and predicts
token t + 2 + i. Everything here is index arithmetic on the device, without a loop over sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def trained_positions(loss_mask: Tensor, cu_seqlens: Tensor, n_predict: int) -> Tensor:
    """Where each head trains: its target lies inside the same sequence and the loss mask is 1 on it.

    Args:
        loss_mask: [T].
        cu_seqlens: [B + 1].

    Returns:
        [n_predict, T], bool.
    """
    num_tokens = loss_mask.shape[0]
    position_T = torch.arange(num_tokens, device=loss_mask.device)
    sequence_ends_B = cu_seqlens[1:].to(device=loss_mask.device, dtype=torch.int64)
    if num_tokens == 0 or sequence_ends_B.numel() == 0:
        return torch.zeros(n_predict, num_tokens, dtype=torch.bool, device=loss_mask.device)
    # right=True: the first end *after* the position, so that empty sequences are stepped over.
    sequence_T = torch.bucketize(position_T, sequence_ends_B, right=True)
    end_T = sequence_ends_B[sequence_T.clamp(max=sequence_ends_B.numel() - 1)]

    target_position_PT = position_T + 2 + torch.arange(n_predict, device=loss_mask.device).unsqueeze(1)
    is_target_T = loss_mask == 1
    return (target_position_PT < end_T) & is_target_T[target_position_PT.clamp(max=num_tokens - 1)]


def count_trained_positions(loss_mask: Tensor, cu_seqlens: Tensor, n_predict: int) -> Tensor:
    """Number of positions that train each head: [n_predict], int64. Counts of parts add up to that of the whole."""
    return trained_positions(loss_mask, cu_seqlens, n_predict).sum(dim=1)


class ChainRows(NamedTuple):
    """Which rows of a packed batch go through a chain of heads: those on which this head or a later one trains.

    Attributes:
        positions: For each head i the positions [N_i] in the batch that it runs on, ascending.
        kept: For each head the rows [N_i] among those of the head before it, and for head 0 among all positions.
        trained: For each head the rows [M_i], of the N_i, that train it.
        trained_positions: For each head the positions [M_i] of these.
    """

    positions: list[Tensor]
    kept: list[Tensor]
    trained: list[Tensor]
    trained_positions: list[Tensor]


def chain_rows(trained_PT: Tensor) -> ChainRows:
    """The rows of each head, from `trained_positions`. The host waits for the device twice, however many heads."""
    num_heads = trained_PT.shape[0]
    needed_PT = trained_PT.flip(0).cumsum(dim=0).flip(0) > 0
    both = torch.cat([needed_PT, trained_PT])
    positions = both.nonzero()[:, 1].split(both.sum(dim=1).tolist())
    needed, trained = list(positions[:num_heads]), list(positions[num_heads:])
    # How many needed positions lie before each one: where a position that a head runs on has its row there.
    row_PT = needed_PT.cumsum(dim=1) - 1
    kept = [needed[0], *(row_PT[i - 1, needed[i]] for i in range(1, num_heads))]
    return ChainRows(needed, kept, [row_PT[i, trained[i]] for i in range(num_heads)], trained)


def head_inputs(input_ids: Tensor, positions: Tensor, head_index: int) -> Tensor:
    """The tokens that a head reads at `positions`: [N] from `input_ids` [T] and `positions` [N]."""
    # A head may pass over a position only to bring its state to a later head, and then the shift can leave the batch.
    return input_ids[(positions + head_index + 1).clamp(max=max(input_ids.shape[0] - 1, 0))]


def head_targets(input_ids: Tensor, positions: Tensor, head_index: int) -> Tensor:
    """The tokens that a head must predict at `positions`: [N] from `input_ids` [T] and `positions` [N]."""
    return head_inputs(input_ids, positions, head_index + 1)
