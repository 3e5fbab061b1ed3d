"""Objectives against the target's own distribution, without the logits of either model ever existing as a whole.

With p the target's distribution of a token, q the drafter's and `α = Σ min(p, q)` the chance that sampled verification
keeps a draft (Leviathan et al. 2023, arXiv:2211.17192), a row's loss is one of

    ce    -log q(x), with x the token of the text: hard labels
    kl    Σ p log(p/q), the forward divergence
    rkl   Σ q log(q/p), the reverse one
    tv    1 - α, the total variation distance
    nla   -log α, the negative log-acceptance
    lk    λ kl + (1 - λ) tv with λ = exp(-η α), which the gradient takes as a constant

or a weighted sum of them. The last two are the LK losses of Samarin et al. 2026, arXiv:2602.23881: the divergence leads
while drafts and target hardly overlap and total variation has next to no gradient, and gives way to it after.

Head i at position t is compared with the target's distribution at position t + 1 + i. Several heads meet at one
position, so the pass goes through chunks of positions, computes the target's probabilities of a chunk once, and lets
every head's rows of that chunk use them. Both gradients are computed on the way, and backward only scales them.

Where heads are weighed adaptively, a row counts for as much as verification is likely to reach it: by the product of
`(1 + a) / 2` over the heads before it at the same position, with a their overlap, or where there is no target
distribution their probability of the text's token. This is the cumulative confidence of D-PACE (Wu et al. 2026,
arXiv:2605.18810, with its smoothing of one half); that of a head's own continuation is left out, since it is known only
after the heads that follow. The product is a constant for the gradient. A head's target lies behind that of the head
before it, so one pass through the positions has every factor in time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from verl_speculator.errors import ConfigError, nearest_name
from verl_speculator.losses.linear_cross_entropy import equal_chunks, matmul_dtype, scaled_gradients

TERMS = ("ce", "kl", "rkl", "tv", "nla", "lk")
# The best of the paper's table.
LK_ETA = 3.0
# The dozen passes over a row's logits find them in the processor's cache if there are so many of them at a time.
_BLOCK_ELEMENTS = 2**18


@dataclass(frozen=True)
class Objective:
    """What a drafter is trained on.

    Attributes:
        weights: One weight for each term, such as `{"kl": 0.9, "lk": 0.1}`.
        temperature: Of both distributions: that at which the drafts are going to be verified.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: {"ce": 1.0})
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if name not in TERMS:
                near = nearest_name(name, TERMS, cutoff=0.5)
                raise ConfigError(
                    f"objective: {name!r} is none of {', '.join(TERMS)}" + (f"; did you mean {near}?" if near else "")
                )
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
                raise ConfigError(f"objective: the weight of {name} must be 0 or a positive number, got {weight!r}")
        if not any(self.weights.values()):
            raise ConfigError("objective: at least one term needs a weight above 0")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"objective: the temperature must be a positive number, got {self.temperature!r}")

    @property
    def needs_target(self) -> bool:
        return any(weight for name, weight in self.weights.items() if name != "ce")


class HeadRows(NamedTuple):
    """What one head drafts, and what it is compared with.

    Attributes:
        states: [N, D].
        weight: [V, D]; heads that give the same tensor are tied.
        labels: [N], int64: the tokens of the text; -1 for one that the head cannot draft, whose row has no `ce`.
        row_weights: [N], constants.
        target_rows: [N], int64, ascending: which row of the target's states each is compared with.
        rows_before: [N], int64: the row of the head before that has the same position, -1 where that head has none
            there; given for all heads but the first, rows are weighed adaptively.
    """

    states: Tensor
    weight: Tensor
    labels: Tensor
    row_weights: Tensor
    target_rows: Tensor
    rows_before: Tensor | None = None


class TargetHead(NamedTuple):
    """How the target's logits follow from its last hidden state `h`: `cap(scale * (h @ weight.T + bias))`.

    Attributes:
        weight: [V, H].
        bias: [V] or None.
        scale: A constant factor, as of Cohere's and Granite's models.
        softcap: `c` where the logits are `c * tanh(logits / c)`, as of Gemma 2.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def at(self, ids: Tensor | None) -> TargetHead:
        """The head for these tokens alone [V'], or for all of them if None."""
        if ids is None:
            return self
        return self._replace(weight=self.weight[ids], bias=None if self.bias is None else self.bias[ids])

    def logits(self, states_RH: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[R, V] from [R, H], of the states' type or of `dtype`, in which what follows the matrix is done."""
        logits = torch.mm(states_RH, self.weight.t()).to(dtype or states_RH.dtype)
        if self.bias is not None:
            logits.add_(self.bias)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


class SoftTargetsOutput(NamedTuple):
    """The loss and what it is made of; each list has an entry for each head.

    Attributes:
        loss: Scalar, the sum of `row_weights * row_losses` over all heads; the only part with a gradient.
        row_losses: [N] each, unweighted, detached.
        cross_entropies: [N] each, of the text's tokens whatever the objective: comparable among runs. Infinite where
            the head cannot draft the token.
        overlaps: [N] each, `α`.
        correct: [N] each, bool: the text's token is the first of the row's largest logits, which greedy drafts take.
    """

    loss: Tensor
    row_losses: list[Tensor]
    cross_entropies: list[Tensor]
    overlaps: list[Tensor]
    correct: list[Tensor]


def soft_target_loss(
    heads: Sequence[HeadRows],
    target_states: Tensor,
    target_head: TargetHead | None,
    objective: Objective,
    *,
    chunk_size: int | None = None,
) -> SoftTargetsOutput:
    """Weighted sum of every row's loss.

    The products run in the inputs' type (or autocast's), everything after them in float32, or float64 if the inputs
    are. Gradients go to the heads' `states` and `weight` only; second derivatives are not supported.

    Args:
        heads: At least one; a head without rows has zero gradients.
        target_states: [M, H], the target's last hidden states; no gradient.
        target_head: None for hard labels alone; overlaps are then 0.
        chunk_size: Rows of `target_states` that are worked on at a time; None chooses from a budget of bytes.
    """
    weights: list[Tensor] = []
    for head in heads:
        if not any(head.weight is weight for weight in weights):
            weights.append(head.weight)
    weight_of = [next(i for i, weight in enumerate(weights) if weight is head.weight) for head in heads]
    inputs = [*(head.states for head in heads), *weights]
    dtype = matmul_dtype(*inputs)
    # Casts outside of the Function are autograd's to undo, after it has applied the upstream scale.
    inputs = [tensor.float() if tensor.dtype == torch.float16 else tensor for tensor in inputs]
    if target_head is not None:
        target_head = target_head._replace(weight=target_head.weight.detach().to(dtype))
    work = _Work(heads, weight_of, target_states.detach().to(dtype), target_head, objective, chunk_size)
    # Asked here, because inside of a Function gradients always look disabled.
    loss, *rows = _SoftTargetLoss.apply(work, dtype, torch.is_grad_enabled(), *inputs)
    n = len(heads)
    return SoftTargetsOutput(loss, *(rows[start : start + n] for start in range(0, 4 * n, n)))


class _Work(NamedTuple):
    """What the pass needs and no gradient goes to."""

    heads: Sequence[HeadRows]
    weight_of: list[int]
    target_states_MH: Tensor
    target_head: TargetHead | None
    objective: Objective
    chunk_size: int | None


class _SoftTargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, dtype: torch.dtype, wants_grad: bool, *inputs: Tensor) -> tuple[Tensor, ...]:
        num_heads = len(work.heads)
        wanted = [wants_grad and needed for needed in ctx.needs_input_grad[3:]]
        casted = [tensor.to(dtype) for tensor in inputs]
        states, weights = casted[:num_heads], casted[num_heads:]
        sum_dtype = torch.promote_types(dtype, torch.float32)
        # Every row is visited, so that nothing of these is left unwritten.
        gradients = [
            None
            if not want
            else torch.empty_like(tensor)
            if i < num_heads
            else torch.zeros_like(tensor, dtype=sum_dtype)
            for i, (tensor, want) in enumerate(zip(casted, wanted, strict=True))
        ]
        row_weights = [head.row_weights.to(sum_dtype, copy=True) for head in work.heads]
        reached = [torch.ones_like(weights_N) for weights_N in row_weights]
        rows = [
            _RowResults(*(tensor.new_empty(len(tensor), dtype=kind) for kind in (*[sum_dtype] * 3, torch.bool)))
            for tensor in states
        ]
        with torch.autocast(states[0].device.type, enabled=False):
            for target_rows, head_rows in _chunks(work, weights[0].shape[0]):
                target = _target_chunk(work, target_rows, sum_dtype)
                for i, own in enumerate(head_rows):
                    if own.start == own.stop:
                        continue
                    weight = weights[work.weight_of[i]]
                    logits_RV = torch.mm(states[i][own], weight.t()).to(sum_dtype)
                    head = work.heads[i]
                    own_target = target and target.at(head.target_rows[own] - target_rows.start)
                    for block in _row_blocks(logits_RV):
                        here = slice(own.start + block.start, own.start + block.stop)
                        block_target = own_target and own_target.of_rows(block)
                        _row_losses(work.objective, logits_RV[block], block_target, head.labels[here], rows[i], here)
                    if head.rows_before is not None:
                        _weigh_by_reach(i, own, head.rows_before[own], rows, reached, has_target=target is not None)
                        row_weights[i][own] *= reached[i][own]
                    row_weights_R1 = row_weights[i][own].unsqueeze(1)
                    grad_RV = logits_RV.to(dtype)
                    grad_states, grad_weight = gradients[i], gradients[num_heads + work.weight_of[i]]
                    if grad_states is not None:
                        torch.mm(grad_RV, weight, out=grad_states[own])
                        grad_states[own].mul_(row_weights_R1)
                    if grad_weight is not None:
                        scaled_RD = (states[i][own] * row_weights_R1).to(dtype)
                        if grad_weight.dtype == dtype:
                            grad_weight.addmm_(grad_RV.t(), scaled_RD)
                        else:
                            grad_weight.add_(grad_RV.t() @ scaled_RD)
        # Not `save_for_backward`: these are nobody's inputs or outputs, and backward may give them away.
        ctx.gradients = [
            None if grad is None else grad.to(tensor.dtype) for grad, tensor in zip(gradients, inputs, strict=True)
        ]
        loss = torch.stack([torch.dot(a, b.losses) for a, b in zip(row_weights, rows, strict=True)]).sum()
        outputs = [part for parts in zip(*rows, strict=True) for part in parts]
        ctx.mark_non_differentiable(*outputs)
        return loss, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, *scaled_gradients(ctx, grad_loss))


def _row_blocks(logits_RV: Tensor) -> Iterator[slice]:
    """Rows that are worked on together, between the products: on a CPU as many as a core's cache holds."""
    num_rows, vocab_size = logits_RV.shape
    size = max(_BLOCK_ELEMENTS // vocab_size, 1) if logits_RV.device.type == "cpu" else num_rows
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


class _RowResults(NamedTuple):
    """A head's results, filled in chunk by chunk."""

    losses: Tensor
    cross_entropies: Tensor
    overlaps: Tensor
    correct: Tensor


class _TargetChunk(NamedTuple):
    """The target's distributions of C positions; the logarithms only where a term needs them."""

    probs_CV: Tensor
    entropy_C1: Tensor
    log_probs_CV: Tensor | None

    def of_rows(self, rows: slice) -> _TargetChunk:
        return _TargetChunk(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]

    def at(self, rows_R: Tensor) -> _TargetChunk:
        # Ascending and without repeats: as many rows as there are need no copy.
        if rows_R.shape[0] == self.probs_CV.shape[0]:
            return self
        log_probs_RV = None if self.log_probs_CV is None else self.log_probs_CV.index_select(0, rows_R)
        return _TargetChunk(
            self.probs_CV.index_select(0, rows_R), self.entropy_C1.index_select(0, rows_R), log_probs_RV
        )


def _weigh_by_reach(
    i: int, own: slice, before_R: Tensor, rows: list[_RowResults], reached: list[Tensor], *, has_target: bool
) -> None:
    """Fill in the chance that verification reaches rows `own` of head i."""
    if rows[i - 1].losses.shape[0] == 0:
        return
    at_R = before_R.clamp(min=0)
    kept_R = rows[i - 1].overlaps[at_R] if has_target else (-rows[i - 1].cross_entropies[at_R]).exp()
    # Nothing is known of a position where the head before has no row.
    reached[i][own] = torch.where(before_R < 0, 1.0, reached[i - 1][at_R] * (1 + kept_R) / 2)


def _target_chunk(work: _Work, rows: slice, sum_dtype: torch.dtype) -> _TargetChunk | None:
    if work.target_head is None:
        return None
    logits_CV = work.target_head.logits(work.target_states_MH[rows], sum_dtype)
    if work.objective.temperature != 1.0:
        logits_CV.div_(work.objective.temperature)
    logsumexp_C1 = logits_CV.logsumexp(dim=1, keepdim=True)
    probs_CV = logits_CV.softmax(dim=1)
    entropy_C1 = logsumexp_C1 - torch.linalg.vecdot(probs_CV, logits_CV).unsqueeze(1)
    # Not the logarithm of the probability, which rounds to zero where a token is out of the question.
    log_probs_CV = logits_CV.sub_(logsumexp_C1) if work.objective.weights.get("rkl") else None
    return _TargetChunk(probs_CV, entropy_C1, log_probs_CV)


def _chunks(work: _Work, vocab_size: int) -> Iterator[tuple[slice, list[slice]]]:
    """Rows of the target's states, and of each head those that are compared with them."""
    num_rows = work.target_states_MH.shape[0]
    size = work.chunk_size or equal_chunks(num_rows, vocab_size, work.target_states_MH.device.type)
    starts = list(range(0, num_rows, size))
    edges = torch.tensor([*starts, num_rows], device=work.target_states_MH.device)
    # One wait for the device, and not one for every chunk and head.
    cuts = torch.stack([torch.searchsorted(head.target_rows.contiguous(), edges) for head in work.heads]).tolist()
    for number, start in enumerate(starts):
        yield slice(start, min(start + size, num_rows)), [slice(cut[number], cut[number + 1]) for cut in cuts]


def _row_losses(
    objective: Objective,
    logits_RV: Tensor,
    target: _TargetChunk | None,
    labels_R: Tensor,
    rows: _RowResults,
    own: slice,
) -> None:
    """Fill in the results of rows `own`; the logits become the gradient of their losses."""
    weights = {name: objective.weights.get(name, 0.0) for name in TERMS}
    max_logit_R1, drafts_R1 = logits_RV.max(dim=1, keepdim=True)
    rows.correct[own] = drafts_R1.squeeze(1) == labels_R
    has_label_R1, labels_R1 = (labels_R >= 0).unsqueeze(1), labels_R.clamp(min=0).unsqueeze(1)
    if objective.temperature != 1.0:
        logits_RV.div_(objective.temperature)
        max_logit_R1 = max_logit_R1 / objective.temperature
    label_logit_R1 = logits_RV.gather(1, labels_R1)
    if target is not None:
        expected_logit_R1 = torch.linalg.vecdot(target.probs_CV, logits_RV).unsqueeze(1)
        log_ratio_RV = None if target.log_probs_CV is None else logits_RV - target.log_probs_CV
    q_RV = torch.softmax(logits_RV, dim=1, out=logits_RV)
    # The largest probability is exp(max - logsumexp): see `linear_cross_entropy`.
    logsumexp_R1 = max_logit_R1 - q_RV.gather(1, drafts_R1).log_()

    # Of every term d/dz: q - onehot for ce.
    ce_R1 = logsumexp_R1 - label_logit_R1
    ce_weight_R1 = has_label_R1.to(logits_RV.dtype) * weights["ce"]
    loss_R1 = ce_weight_R1 * ce_R1
    if target is None:
        rows.overlaps[own] = 0.0
        grad_RV = q_RV.mul_(ce_weight_R1)
    else:
        p_RV = target.probs_CV
        kl_R1 = logsumexp_R1 - expected_logit_R1 - target.entropy_C1
        overlap_R1 = torch.minimum(q_RV, p_RV).sum(dim=1, keepdim=True)
        rows.overlaps[own] = overlap_R1.squeeze(1)
        blend_R1 = torch.exp(-LK_ETA * overlap_R1)
        # No overlap at all is a matter of rounding; its logarithm would stop the training.
        overlap_or_tiny_R1 = overlap_R1.clamp(min=torch.finfo(overlap_R1.dtype).tiny ** 0.5)
        kl_weight_R1 = weights["kl"] + weights["lk"] * blend_R1
        tv_weight_R1 = weights["tv"] + weights["lk"] * (1 - blend_R1)
        loss_R1 = loss_R1 + kl_weight_R1 * kl_R1 + tv_weight_R1 * (1 - overlap_R1)
        loss_R1 = loss_R1 - weights["nla"] * overlap_or_tiny_R1.log()
        tv_weight_R1 = tv_weight_R1 + weights["nla"] / overlap_or_tiny_R1
        wants_overlap = any(weights[name] for name in ("tv", "nla", "lk"))

        # q - p for kl; q (S - [q < p]) for tv, with S the sum of q over q < p; q (log(q/p) - rkl) for rkl.
        reverse_RV = None
        if log_ratio_RV is not None:
            log_ratio_RV.sub_(logsumexp_R1)
            rkl_R1 = torch.linalg.vecdot(q_RV, log_ratio_RV).unsqueeze(1)
            loss_R1 = loss_R1 + weights["rkl"] * rkl_R1
            reverse_RV = log_ratio_RV.sub_(rkl_R1).mul_(q_RV).mul_(weights["rkl"])
        q_weight_R1 = ce_weight_R1 + kl_weight_R1
        if wants_overlap:
            below_RV = torch.where(q_RV < p_RV, q_RV, 0.0)
            q_weight_R1 = q_weight_R1 + tv_weight_R1 * below_RV.sum(dim=1, keepdim=True)
        grad_RV = q_RV.mul_(q_weight_R1)
        if weights["kl"] or weights["lk"]:
            grad_RV.addcmul_(p_RV, kl_weight_R1, value=-1.0)
        if wants_overlap:
            grad_RV.addcmul_(below_RV, tv_weight_R1, value=-1.0)
        if reverse_RV is not None:
            grad_RV.add_(reverse_RV)
    if weights["ce"]:
        grad_RV.scatter_add_(1, labels_R1, -ce_weight_R1)
    rows.losses[own] = loss_R1.squeeze(1)
    rows.cross_entropies[own] = ce_R1.masked_fill(~has_label_R1, torch.inf).squeeze(1)
    if objective.temperature != 1.0:
        grad_RV.div_(objective.temperature)
