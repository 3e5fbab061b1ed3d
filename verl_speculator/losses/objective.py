"""The training objective of a chain of draft heads, on packed sequences, and the metrics that come with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from verl_speculator.errors import ConfigError, DataError
from verl_speculator.losses.alignment import chain_rows, head_inputs, head_targets, trained_positions
from verl_speculator.losses.linear_cross_entropy import linear_cross_entropy
from verl_speculator.losses.packed import PackedHiddenStates
from verl_speculator.models import ChainSpeculator


class SpeculatorLoss(NamedTuple):
    """A differentiable scalar, and detached scalars that may be summed over micro-batches and ranks."""

    loss: Tensor
    metrics: dict[str, Tensor]


def speculator_loss(
    speculator: ChainSpeculator,
    packed: PackedHiddenStates,
    *,
    head_loss_weights: Sequence[float] | None = None,
    chunk_size: int | None = None,
) -> SpeculatorLoss:
    """Weighted mean over all heads of each head's mean cross entropy over its trained positions.

    Means divide by `packed.head_counts` where it is given, and then the losses of a batch's parts add up to the loss
    of the whole. A head that nothing trains contributes 0 and the other heads' weights stay as they are: were they
    scaled up, one head's gradient would depend on whether another head had data.

    Every head runs even where it trains nothing, on empty tensors. So every parameter gets a gradient on every rank,
    and ranks do not wait for one another in a sharded backward.

    Args:
        head_loss_weights: n_predict weights, used in proportion to their sum; None weighs all heads alike.
        chunk_size: see `linear_cross_entropy`.

    Returns:
        The loss, and for each head i `head_{i}/loss_sum`, `head_{i}/count`, `head_{i}/correct_sum` (top-1), and
        `prefix_{i}/count` and `prefix_{i}/correct_sum`: positions where heads 0 to i are all trained, and all right.
    """
    n_predict = speculator.n_predict
    weights = _normalised_weights(head_loss_weights, n_predict)
    trained_PT = trained_positions(packed.loss_mask, packed.cu_seqlens, n_predict)
    counts_P = trained_PT.sum(dim=1) if packed.head_counts is None else packed.head_counts.to(trained_PT.device)
    if counts_P.shape[0] != n_predict:
        raise DataError(f"head_counts must hold one count per head ({n_predict}); got {counts_P.shape[0]}.")

    rows = chain_rows(trained_PT)
    embedded = speculator.embed_all([head_inputs(packed.input_ids, at_N, i) for i, at_N in enumerate(rows.positions)])
    unrolled = speculator.unroll(packed.hidden_states, embedded, lambda part, i: _select(part, rows.kept[i]))
    outputs = [_select(output_ND, rows.trained[i]) for i, output_ND in enumerate(unrolled)]
    targets = [head_targets(packed.input_ids, at_N, i) for i, at_N in enumerate(rows.trained_positions)]

    sum_dtype = torch.promote_types(outputs[0].dtype, torch.float32)
    scales_P = torch.tensor(weights, dtype=sum_dtype).to(trained_PT.device) / counts_P.clamp(min=1).to(sum_dtype)
    row_weights = [scales_P[i].expand(len(at_N)) for i, at_N in enumerate(rows.trained_positions)]
    if speculator.heads_are_tied:
        # One call: the gradient of the shared matrix is then summed in place rather than once per head.
        calls = [(torch.cat(outputs), speculator.head_weight(0), torch.cat(targets), torch.cat(row_weights))]
    else:
        matrices = [speculator.head_weight(i) for i in range(n_predict)]
        calls = list(zip(outputs, matrices, targets, row_weights, strict=True))
    results = [linear_cross_entropy(*call, chunk_size=chunk_size) for call in calls]

    # All heads' rows one head after the other, which is the order of the trained positions in [n_predict, T].
    row_losses, correct = (torch.cat([getattr(part, name) for part in results]) for name in ("row_losses", "correct"))
    correct_PT = torch.zeros_like(trained_PT).masked_scatter_(trained_PT, correct)
    loss_sums_P = torch.stack([losses.sum() for losses in row_losses.split([len(head) for head in outputs])])
    loss = torch.stack([part.loss for part in results]).sum()
    return SpeculatorLoss(loss, _metric_sums(trained_PT, correct_PT, loss_sums_P))


def speculator_metrics(sums: Mapping[str, float], n_predict: int) -> dict[str, float]:
    """Divide summed metrics once, after every micro-batch and rank has been added.

    Args:
        sums: the totals of the metrics of `speculator_loss`.

    Returns:
        `head_{i}/loss` and `head_{i}/accuracy`; `loss`, their unweighted mean over heads; and `acceptance_length`, the
        expected tokens per verification of greedy drafts along the training text, the target's own token included:
        1 + the sum over i of the share of positions where heads 0 to i are all right. What has no positions is 0.
    """
    metrics: dict[str, float] = {}
    acceptance_length = 1.0
    for i in range(n_predict):
        metrics[f"head_{i}/loss"] = _ratio(sums[f"head_{i}/loss_sum"], sums[f"head_{i}/count"])
        metrics[f"head_{i}/accuracy"] = _ratio(sums[f"head_{i}/correct_sum"], sums[f"head_{i}/count"])
        acceptance_length += _ratio(sums[f"prefix_{i}/correct_sum"], sums[f"prefix_{i}/count"])
    metrics["loss"] = sum(metrics[f"head_{i}/loss"] for i in range(n_predict)) / n_predict
    metrics["acceptance_length"] = acceptance_length
    return metrics


def _ratio(total: float, count: float) -> float:
    return float(total) / float(count) if count else 0.0


def _normalised_weights(head_loss_weights: Sequence[float] | None, n_predict: int) -> list[float]:
    if head_loss_weights is None:
        return [1.0 / n_predict] * n_predict
    weights = [float(weight) for weight in head_loss_weights]
    if len(weights) != n_predict:
        raise ConfigError(f"head_loss_weights must hold one weight per head ({n_predict}); got {len(weights)}.")
    total = sum(weights)
    if min(weights) < 0 or not 0 < total < float("inf"):
        raise ConfigError(f"head_loss_weights must be finite, not negative and not all zero; got {weights}.")
    return [weight / total for weight in weights]


def _select(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows of a tensor, where `index` is sorted and without repeats: all rows need no copy."""
    if index.shape[0] == tensor.shape[0]:
        return tensor
    return _SelectRows.apply(tensor, index) if tensor.requires_grad else tensor.index_select(0, index)


class _SelectRows(torch.autograd.Function):
    """`index_select` of rows without repeats, whose backward copies rows where torch's adds them up, row by row."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = tensor.shape[0]
        return tensor.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, index, grad), None


def _metric_sums(trained_PT: Tensor, correct_PT: Tensor, loss_sums_P: Tensor) -> dict[str, Tensor]:
    prefix_trained_PT = trained_PT.cumprod(dim=0)
    prefix_correct_PT = (correct_PT & trained_PT).cumprod(dim=0)
    columns = {
        "head_{}/loss_sum": loss_sums_P,
        "head_{}/count": trained_PT.sum(dim=1),
        "head_{}/correct_sum": correct_PT.sum(dim=1),
        "prefix_{}/count": prefix_trained_PT.sum(dim=1),
        "prefix_{}/correct_sum": prefix_correct_PT.sum(dim=1),
    }
    return {name.format(i): sums_P[i].float() for i in range(trained_PT.shape[0]) for name, sums_P in columns.items()}
