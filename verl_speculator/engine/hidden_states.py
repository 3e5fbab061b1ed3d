"""Getting a causal language model's last hidden states, whatever its class, without keeping those of every layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from verl_speculator.errors import ConfigError


class LastHiddenStates:
    """The states that went into ``lm_head`` in the last forward pass, until they are taken."""

    def __init__(self) -> None:
        self._states: Tensor | None = None

    def put(self, states: Tensor) -> None:
        self._states = states

    def take(self) -> Tensor:
        states, self._states = self._states, None
        if states is None:
            raise RuntimeError("the base model's forward pass did not call its output embeddings")
        return states


class _Tap(nn.Module):
    """Stands where ``lm_head`` stood; the logits come out empty.

    Models differ in what they do around the head (scaling, soft caps), but all call it on the states after the final
    norm, so this needs nothing of the model's own code and the vocabulary matmul never runs.
    """

    def __init__(self, last: LastHiddenStates) -> None:
        super().__init__()
        self._last = last

    def forward(self, hidden_states: Tensor) -> Tensor:
        self._last.put(hidden_states)
        return hidden_states[..., :0]


def replace_lm_head(model: Any) -> LastHiddenStates:
    """Put a tap in the place of the head; its weights are freed unless the input embeddings share them."""
    _output_embeddings(model)
    last = LastHiddenStates()
    model.set_output_embeddings(_Tap(last))
    return last


def record_lm_head_input(model: Any) -> LastHiddenStates:
    """Watch a head that goes on running, for joint training."""
    last = LastHiddenStates()
    _output_embeddings(model).register_forward_pre_hook(lambda module, args: last.put(args[0]))
    return last


def _output_embeddings(model: Any) -> nn.Module:
    lm_head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if lm_head is None:
        raise ConfigError(f"model.path: a {type(model).__name__} has no lm_head; a causal language model is needed")
    return lm_head


def drop_padding(hidden_states: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``[T, H]`` from right-padded ``[B, S, H]``."""
    lengths = cu_seqlens.diff().to(hidden_states.device)
    kept = torch.arange(hidden_states.shape[1], device=hidden_states.device) < lengths.unsqueeze(1)
    return hidden_states[kept]


class _GatherSequence(torch.autograd.Function):
    """All-gather along the first dimension whose backward adds up what each rank's own loss sends back."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, group: Any) -> Tensor:
        ctx.group = group
        size = torch.distributed.get_world_size(group)
        whole = shard.new_empty(shard.shape[0] * size, *shard.shape[1:])
        torch.distributed.all_gather_into_tensor(whole, shard.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad_whole: Tensor) -> tuple[Tensor, None]:
        size = torch.distributed.get_world_size(ctx.group)
        grad_shard = grad_whole.new_empty(grad_whole.shape[0] // size, *grad_whole.shape[1:])
        torch.distributed.reduce_scatter_tensor(grad_shard, grad_whole.contiguous(), group=ctx.group)
        return grad_shard, None


def gather_sequence(shard: Tensor, group: Any, pad_size: int) -> Tensor:
    """The whole packed sequence ``[T, H]`` from each rank's slice of it ``[(T + pad) / size, H]``.

    Each rank of the group then computes a different part of the loss, so the gradients of a slice are summed over the
    group. (verl's own gather is for losses that every rank computes alike.)
    """
    whole = _GatherSequence.apply(shard, group)
    return whole[: whole.shape[0] - pad_size]


def share_of_targets(loss_mask: Tensor, rank: int, size: int) -> Tensor:
    """The loss mask ``[T]`` with only this rank's equal share of the trained tokens left in it.

    The ranks of a group that all hold the same batch share out its loss so, whatever part of it is prompt. Where two
    shares meet, no rank sees the targets of all heads of a position; the heads' losses miss nothing by it.
    """
    is_target_T = loss_mask == 1
    ordinal_T = is_target_T.cumsum(dim=0)
    total = ordinal_T[-1:]
    start, stop = total * rank // size, total * (rank + 1) // size
    return loss_mask * (is_target_T & (ordinal_T > start) & (ordinal_T <= stop))


def share_of_sequences(loss_mask: Tensor, cu_seqlens: Tensor, rank: int, size: int) -> Tensor:
    """The loss mask ``[T]`` with only every ``size``-th sequence left in it, for what needs sequences uncut."""
    sequence_T = torch.bucketize(
        torch.arange(loss_mask.shape[0], device=loss_mask.device), cu_seqlens[1:].to(loss_mask.device), right=True
    )
    return loss_mask * (sequence_T % size == rank)
