"""Ranks that hold the same batch, or slices of it: how they bring it together and divide the work on it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from verl_speculator.losses import PackedHiddenStates


class _GatherSequence(torch.autograd.Function):
    """All-gather along the first dimension whose backward adds up what each rank's own loss sends back."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, group: Any) -> Tensor:
        ctx.group = group
        size = torch.distributed.get_world_size(group)
        full = shard.new_empty(shard.shape[0] * size, *shard.shape[1:])
        torch.distributed.all_gather_into_tensor(full, shard.contiguous(), group=group)
        return full

    @staticmethod
    def backward(ctx: Any, grad_full: Tensor) -> tuple[Tensor, None]:
        size = torch.distributed.get_world_size(ctx.group)
        grad_shard = grad_full.new_empty(grad_full.shape[0] // size, *grad_full.shape[1:])
        torch.distributed.reduce_scatter_tensor(grad_shard, grad_full.contiguous(), group=ctx.group)
        return grad_shard, None


def gather_sequence(shard: Tensor, group: Any, pad_size: int) -> Tensor:
    """The full packed sequence [T, H] from each rank's slice of it [(T + pad) / size, H].

    Each rank of the group then computes a different part of the loss, so the gradients of a slice are summed over the
    group. (verl's own gather is for losses that every rank computes alike.)
    """
    full = _GatherSequence.apply(shard, group)
    return full[: full.shape[0] - pad_size]


def share_of_targets(loss_mask: Tensor, rank: int, size: int) -> Tensor:
    """The loss mask [T] with only this rank's equal share of the trained tokens left in it.

    The ranks of a group that all hold the same batch divide its loss so, whatever part of it is prompt. Where two
    shares meet, no rank sees the targets of all heads of a position; the heads' losses miss nothing by it.
    """
    if size == 1:
        return loss_mask
    is_target_T = loss_mask == 1
    ordinal_T = is_target_T.cumsum(dim=0)
    total = ordinal_T[-1:]
    start, stop = total * rank // size, total * (rank + 1) // size
    return loss_mask * (is_target_T & (ordinal_T > start) & (ordinal_T <= stop))


def share_of_sequences(packed: PackedHiddenStates, rank: int, size: int) -> PackedHiddenStates:
    """Every `size`-th whole sequence of a batch, for work that needs sequences uncut."""
    if size == 1:
        return packed
    return only_sequences(packed, torch.arange(packed.num_sequences, device=packed.cu_seqlens.device) % size == rank)


def only_sequences(packed: PackedHiddenStates, is_own_B: Tensor) -> PackedHiddenStates:
    """A batch with some of its sequences.

    Where none is left it gets the first one with nothing to train: adapters then never see an empty batch, and all
    ranks make the same calls.
    """
    is_idle = not is_own_B.any()
    if is_idle:
        is_own_B = torch.arange(packed.num_sequences, device=is_own_B.device) == 0
    lengths_B = packed.cu_seqlens.diff()
    index_T = is_own_B.repeat_interleave(lengths_B, output_size=packed.num_tokens).to(packed.input_ids.device)
    index_T = index_T.nonzero().squeeze(1)
    loss_mask = packed.loss_mask[index_T]

    def own(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.index_select(0, index_T)

    return dataclasses.replace(
        packed,
        hidden_states=packed.hidden_states.index_select(0, index_T),
        input_ids=packed.input_ids[index_T],
        loss_mask=torch.zeros_like(loss_mask) if is_idle else loss_mask,
        cu_seqlens=torch.cat([packed.cu_seqlens[:1], lengths_B[is_own_B].cumsum(dim=0)]),
        aux_hidden_states=own(packed.aux_hidden_states),
        position_ids=own(packed.position_ids),
    )
