"""Getting a causal language model's last hidden states, whatever its class, without keeping those of every layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from verl_speculator.errors import ConfigError


class HiddenStateTap(nn.Module):
    """Stands where ``lm_head`` stood and keeps what would have gone into it; the logits come out empty.

    Models differ in what they do around the head (scaling, soft caps), but all call it on the states after the final
    norm, so this needs nothing of the model's own code and the vocabulary matmul never runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self._hidden_states: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        self._hidden_states = hidden_states
        return hidden_states[..., :0]

    def take(self) -> Tensor:
        """The states of the last forward pass, once."""
        hidden_states, self._hidden_states = self._hidden_states, None
        if hidden_states is None:
            raise RuntimeError("the base model's forward pass did not call its output embeddings")
        return hidden_states


class HiddenStateRecorder:
    """Keeps what goes into an ``lm_head`` that still runs, for joint training."""

    def __init__(self, lm_head: nn.Module) -> None:
        self._hidden_states: Tensor | None = None
        lm_head.register_forward_pre_hook(self._record)

    def _record(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._hidden_states = args[0]

    def take(self) -> Tensor:
        hidden_states, self._hidden_states = self._hidden_states, None
        if hidden_states is None:
            raise RuntimeError("the base model's forward pass did not call its output embeddings")
        return hidden_states


def replace_lm_head(model: nn.Module) -> HiddenStateTap:
    """Put a tap in the place of the head; its weights are freed unless the input embeddings share them."""
    _output_embeddings(model)
    tap = HiddenStateTap()
    model.set_output_embeddings(tap)
    return tap


def record_lm_head_input(model: nn.Module) -> HiddenStateRecorder:
    return HiddenStateRecorder(_output_embeddings(model))


def _output_embeddings(model: nn.Module) -> nn.Module:
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


def share_of_sequence(loss_mask: Tensor, rank: int, size: int) -> Tensor:
    """The loss mask with only this rank's equal share of the positions left in it."""
    num_tokens = loss_mask.shape[0]
    share = torch.zeros_like(loss_mask)
    start, stop = num_tokens * rank // size, num_tokens * (rank + 1) // size
    share[start:stop] = loss_mask[start:stop]
    return share
