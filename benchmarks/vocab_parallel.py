"""`linear_cross_entropy` with the vocabulary divided over a group of ranks: what the engines could do and do not.

`bench_tensor_parallel.py` compares it with what they do. It is written with the same care as
`verl_speculator.losses.linear_cross_entropy`: the same chunks of as many bytes, the same three matrix products, the
same work in place. The states of all rows are on every rank; a rank computes the logits of its part of the vocabulary.

Ranks exchange three numbers per row and chunk (their own log-sum-exp, their largest logit and the target's logit), from
which each merges the log-sum-exp of the whole row, as in the online softmax of Milakov and Gimelshein (2018,
https://arxiv.org/abs/1805.02867), and then sum up the gradient of the states, which runs next to the matrix products
where the group can do that. Weights and their gradients stay where they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from verl_speculator.losses.linear_cross_entropy import equal_chunks


def vocab_parallel_cross_entropy(
    states: Tensor,
    weight_shard: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    group: dist.ProcessGroup,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the cross entropies, and which rows [N] are right: the same on every rank of the group.

    Args:
        states: [N, D], the same on every rank; so is its gradient.
        weight_shard: [V / size, D], the rank's rows of the weight, in the order of the ranks.
        targets: [N], int64, each in [0, V).
        row_weights: [N], constants.
        chunk_size: rows of logits that exist at a time; None chooses as `linear_cross_entropy` does, from the bytes
            of a rank's own part of the logits.
    """
    rows = chunk_size or equal_chunks(states.shape[0], weight_shard.shape[0], states.device.type)
    return _VocabParallelCrossEntropy.apply(states, weight_shard, targets, row_weights, group, rows)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        row_weights: Tensor,
        group: dist.ProcessGroup,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        work = _Pass(states, weight, group, rows)
        row_weights = row_weights.to(work.sum_dtype)
        for start in range(0, states.shape[0], rows):
            chunk = slice(start, start + rows)
            work.run_chunk(chunk, targets[chunk], row_weights[chunk])
        ctx.work = work
        ctx.mark_non_differentiable(work.correct)
        return torch.dot(row_weights, work.row_losses), work.correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        work, ctx.work = ctx.work, None
        work.finish()
        grad_weight = work.grad_weight.to(work.weight_VD.dtype)
        scaled = [grad.mul_(grad_loss.to(grad.dtype)) for grad in (work.grad_states, grad_weight)]
        return *scaled, None, None, None, None


class _Pass:
    """The buffers and results of one pass over the rows. V is a rank's part of the vocabulary."""

    def __init__(self, states: Tensor, weight: Tensor, group: dist.ProcessGroup, rows: int) -> None:
        self.states_ND = states
        self.weight_VD = weight
        self.sum_dtype = torch.promote_types(states.dtype, torch.float32)
        self.logits_RV = states.new_empty(rows, weight.shape[0])
        in_sum_dtype = self.sum_dtype == states.dtype
        self.probs_RV = self.logits_RV if in_sum_dtype else torch.empty_like(self.logits_RV, dtype=self.sum_dtype)
        self.row_losses = states.new_zeros(states.shape[0], dtype=self.sum_dtype)
        self.correct = states.new_zeros(states.shape[0], dtype=torch.bool)
        self.grad_states = torch.empty_like(states)
        self.grad_weight = torch.empty_like(weight, dtype=self.sum_dtype)
        self._group = group
        self._first_token = dist.get_rank(group) * weight.shape[0]
        self._sums_under_way: list[Any] = []

    def run_chunk(self, chunk: slice, targets_R: Tensor, row_weights_R: Tensor) -> None:
        rows = targets_R.shape[0]
        logits_RV, probs_RV = self.logits_RV[:rows], self.probs_RV[:rows]
        torch.mm(self.states_ND[chunk], self.weight_VD.t(), out=logits_RV)
        if probs_RV.dtype != logits_RV.dtype:
            probs_RV.copy_(logits_RV)

        here_R1 = (targets_R - self._first_token).unsqueeze(1)
        is_here_R1 = (here_R1 >= 0) & (here_R1 < self.weight_VD.shape[0])
        here_R1 = here_R1.clamp(0, self.weight_VD.shape[0] - 1)
        target_logit_R1 = probs_RV.gather(1, here_R1).masked_fill_(~is_here_R1, 0)
        max_logit_R1 = probs_RV.amax(dim=1, keepdim=True)
        # The softmax of this rank's part, in one pass; its largest entry gives the part's log-sum-exp.
        torch.softmax(probs_RV, dim=1, out=probs_RV)
        own_logsumexp_R1 = max_logit_R1 - probs_RV.amax(dim=1, keepdim=True).log_()
        parts_SR3 = self._exchange(torch.cat([own_logsumexp_R1, max_logit_R1, target_logit_R1], dim=1))
        logsumexp_R = parts_SR3[..., 0].logsumexp(dim=0)
        target_logit_R = parts_SR3[..., 2].sum(dim=0)
        self.row_losses[chunk] = logsumexp_R - target_logit_R
        self.correct[chunk] = target_logit_R == parts_SR3[..., 1].amax(dim=0)

        # From the softmax of the part to that of the row, and to the gradient of the unweighted losses.
        probs_RV.mul_((own_logsumexp_R1 - logsumexp_R.unsqueeze(1)).exp_())
        probs_RV.scatter_add_(1, here_R1, -is_here_R1.to(probs_RV.dtype))
        if probs_RV.dtype != logits_RV.dtype:
            logits_RV.copy_(probs_RV)
        self._add_gradients(chunk, logits_RV, row_weights_R.unsqueeze(1))

    def _exchange(self, own: Tensor) -> Tensor:
        """Every rank's tensor, stacked."""
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(parts, own, group=self._group)
        return torch.stack(parts)

    def _add_gradients(self, chunk: slice, grad_RV: Tensor, row_weights_R1: Tensor) -> None:
        grad_states_RD = self.grad_states[chunk]
        torch.mm(grad_RV, self.weight_VD, out=grad_states_RD)
        grad_states_RD.mul_(row_weights_R1)
        self._sums_under_way.append(dist.all_reduce(grad_states_RD, group=self._group, async_op=True))

        states_RD = (self.states_ND[chunk] * row_weights_R1).to(grad_RV.dtype)
        is_first = chunk.start == 0
        if self.grad_weight.dtype == grad_RV.dtype:
            self.grad_weight.addmm_(grad_RV.t(), states_RD, beta=0 if is_first else 1)
        elif is_first:
            self.grad_weight.copy_(grad_RV.t() @ states_RD)
        else:
            self.grad_weight.add_(grad_RV.t() @ states_RD)

    def finish(self) -> None:
        """Wait until the gradient of the states is that of the whole vocabulary."""
        while self._sums_under_way:
            self._sums_under_way.pop(0).wait()
