"""The training objective of a chain of draft heads, on packed sequences, and the metrics that come with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch
from torch import Tensor

from verl_speculator.errors import ConfigError, DataError
from verl_speculator.losses.alignment import (
    ChainRows,
    chain_rows,
    count_trained_positions,
    head_inputs,
    head_targets,
    trained_positions,
)
from verl_speculator.losses.linear_cross_entropy import linear_cross_entropy
from verl_speculator.losses.packed import PackedHiddenStates
from verl_speculator.losses.soft_targets import HeadRows, Objective, soft_target_loss
from verl_speculator.models import ChainSpeculator

# One weight for each head, `{"decay": γ}`, `"adaptive"`, or None.
HeadLossWeights: TypeAlias = Sequence[float] | Mapping[str, float] | str | None

CROSS_ENTROPY = Objective()


class SpeculatorLoss(NamedTuple):
    """A differentiable scalar, and detached scalars that may be summed over micro-batches and ranks."""

    loss: Tensor
    metrics: dict[str, Tensor]


def speculator_loss(
    speculator: ChainSpeculator,
    packed: PackedHiddenStates,
    *,
    objective: Objective = CROSS_ENTROPY,
    head_loss_weights: HeadLossWeights = None,
    chunk_size: int | None = None,
) -> SpeculatorLoss:
    """Weighted mean over all heads of each head's mean loss over its trained positions.

    With a draft vocabulary hard labels train where they are in it, and soft targets are the target's distribution
    renormalised over it, as in EAGLE-3's trainer of Speculators. A token outside of it still counts as a miss.

    Means divide by `packed.head_counts` where it is given, and then the losses of a batch's parts add up to the loss
    of the whole. A head that nothing trains contributes 0 and the other heads' weights stay as they are: were they
    scaled up, one head's gradient would depend on whether another head had data.

    Every head runs even where it trains nothing, on empty tensors. So every parameter gets a gradient on every rank,
    and ranks do not wait for one another in a sharded backward.

    Args:
        objective: What each position's loss is; one that compares with the target needs `packed.base_head`.
        head_loss_weights: n_predict weights, used in proportion to their sum; `{"decay": γ}` weighs head i by γ^i;
            None weighs all heads alike. `"adaptive"` does too, and each position by the chance that verification
            reaches it, see `soft_targets`.
        chunk_size: see `linear_cross_entropy` and `soft_target_loss`.

    Returns:
        The loss, and for each head i `head_{i}/loss_sum`, `head_{i}/count`, `head_{i}/correct_sum` (top-1), and
        `prefix_{i}/count` and `prefix_{i}/correct_sum`: positions where heads 0 to i are all trained, and all right.
        Against the target also `head_{i}/cross_entropy_sum` and `head_{i}/overlap_sum`, the share of drafts that
        sampled verification keeps. With a draft vocabulary also `head_{i}/outside_sum`, positions whose token is not in
        it, and `head_{i}/loss_count`, those that `loss_sum` is over; what is compared with the target's distribution is
        then compared with that over the draft vocabulary.
    """
    n_predict = speculator.n_predict
    weights = normalised_weights(head_loss_weights, n_predict)
    trained_PT = trained_positions(packed.loss_mask, packed.cu_seqlens, n_predict)
    counts_P = packed.head_counts
    if counts_P is None:
        counts_P = count_loss_rows(speculator, objective, packed.input_ids, packed.loss_mask, packed.cu_seqlens)
    counts_P = counts_P.to(trained_PT.device)
    if counts_P.shape[0] != n_predict:
        raise DataError(f"head_counts must hold one count per head ({n_predict}); got {counts_P.shape[0]}.")

    rows = chain_rows(trained_PT)
    embedded = speculator.embed_all([head_inputs(packed.input_ids, at_N, i) for i, at_N in enumerate(rows.positions)])
    unrolled = speculator.unroll(packed.hidden_states, embedded, lambda part, i: _select(part, rows.kept[i]))
    outputs = [_select(output_ND, rows.trained[i]) for i, output_ND in enumerate(unrolled)]
    # -1 for what cannot be drafted, which every draft misses.
    targets = [
        speculator.to_draft_ids(head_targets(packed.input_ids, at_N, i))
        for i, at_N in enumerate(rows.trained_positions)
    ]

    sum_dtype = torch.promote_types(outputs[0].dtype, torch.float32)
    scales_P = torch.tensor(weights, dtype=sum_dtype).to(trained_PT.device) / counts_P.clamp(min=1).to(sum_dtype)
    row_weights = [scales_P[i].repeat(len(at_N)) for i, at_N in enumerate(rows.trained_positions)]
    is_reduced, learns_labels = speculator.draft_ids is not None, bool(objective.weights.get("ce"))
    is_outside = [target_N < 0 for target_N in targets]
    if is_reduced and learns_labels:
        row_weights = [row.masked_fill(outside_N, 0.0) for row, outside_N in zip(row_weights, is_outside, strict=True)]
    heads = [
        HeadRows(
            outputs[i],
            speculator.head_weight(i),
            targets[i],
            row_weights[i],
            *_related_rows(rows, i, head_loss_weights),
        )
        for i in range(n_predict)
    ]
    more_sums = {}
    if objective.needs_target or head_loss_weights == "adaptive":
        target_head = None
        if objective.needs_target:
            if packed.base_head is None:
                raise DataError("an objective against the target's distribution needs target_head in the batch.")
            target_head = packed.base_head.at(speculator.draft_ids)
        target_states = _select(packed.hidden_states.detach(), rows.trained_positions[0] + 1)
        result = soft_target_loss(heads, target_states, target_head, objective, chunk_size=chunk_size)
        loss, row_losses, correct = result.loss, result.row_losses, result.correct
        if objective.needs_target:
            for i in range(n_predict):
                drafted = result.cross_entropies[i].masked_fill(is_outside[i], 0.0)
                more_sums[f"head_{i}/cross_entropy_sum"] = drafted.sum().float()
                more_sums[f"head_{i}/overlap_sum"] = result.overlaps[i].sum().float()
    else:
        labels = [target_N.clamp(min=0) for target_N in targets]
        calls = [(head.states, head.weight, labels[i], head.row_weights) for i, head in enumerate(heads)]
        if speculator.heads_are_tied:
            # One call: the gradient of the tied matrix is then summed in place rather than once per head.
            calls = [(torch.cat(outputs), heads[0].weight, torch.cat(labels), torch.cat(row_weights))]
        results = [linear_cross_entropy(*call, chunk_size=chunk_size) for call in calls]
        loss = torch.stack([part.loss for part in results]).sum()
        sizes = [len(label_N) for label_N in labels]
        row_losses = torch.cat([part.row_losses for part in results]).split(sizes)
        correct = torch.cat([part.correct for part in results]).split(sizes)
        if is_reduced:
            correct = [correct_N & ~outside_N for correct_N, outside_N in zip(correct, is_outside, strict=True)]
    if is_reduced:
        if learns_labels:
            row_losses = [
                row.masked_fill(outside_N, 0.0) for row, outside_N in zip(row_losses, is_outside, strict=True)
            ]
        for i, outside_N in enumerate(is_outside):
            more_sums[f"head_{i}/outside_sum"] = outside_N.sum().float()
            more_sums[f"head_{i}/loss_count"] = (
                (~outside_N if learns_labels else torch.ones_like(outside_N)).sum().float()
            )

    # All heads' rows one head after the other, which is the order of the trained positions in [n_predict, T].
    correct_PT = torch.zeros_like(trained_PT).masked_scatter_(trained_PT, torch.cat(correct))
    loss_sums_P = torch.stack([losses.sum() for losses in row_losses])
    return SpeculatorLoss(loss, _metric_sums(trained_PT, correct_PT, loss_sums_P) | more_sums)


def count_loss_rows(
    speculator: ChainSpeculator, objective: Objective, input_ids: Tensor, loss_mask: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """[n_predict], int64: what each head's mean loss divides by; counts of parts add up to that of the whole."""
    if speculator.draft_ids is not None and objective.weights.get("ce"):
        loss_mask = loss_mask * (speculator.to_draft_ids(input_ids) >= 0)
    return count_trained_positions(loss_mask, cu_seqlens, speculator.n_predict)


def speculator_metrics(sums: Mapping[str, float], n_predict: int) -> dict[str, float]:
    """Divide summed metrics once, after every micro-batch and rank has been added.

    Args:
        sums: the totals of the metrics of `speculator_loss`.

    Returns:
        `head_{i}/loss` and `head_{i}/accuracy`; `loss`, their unweighted mean over heads; and `acceptance_length`, the
        expected tokens per verification of greedy drafts along the training text, the target's own token included:
        1 + the sum over i of the share of positions where heads 0 to i are all right. Against the target also
        `head_{i}/cross_entropy` and `head_{i}/overlap`, and with a draft vocabulary `head_{i}/outside`, the share of
        positions whose token cannot be drafted. What has no positions is 0.
    """
    metrics: dict[str, float] = {}
    acceptance_length = 1.0
    for i in range(n_predict):
        count = sums[f"head_{i}/count"]
        metrics[f"head_{i}/loss"] = _ratio(sums[f"head_{i}/loss_sum"], sums.get(f"head_{i}/loss_count", count))
        metrics[f"head_{i}/accuracy"] = _ratio(sums[f"head_{i}/correct_sum"], count)
        drafted = count - sums.get(f"head_{i}/outside_sum", 0.0)
        for name, over in {"cross_entropy": drafted, "overlap": count, "outside": count}.items():
            if f"head_{i}/{name}_sum" in sums:
                metrics[f"head_{i}/{name}"] = _ratio(sums[f"head_{i}/{name}_sum"], over)
        acceptance_length += _ratio(sums[f"prefix_{i}/correct_sum"], sums[f"prefix_{i}/count"])
    metrics["loss"] = sum(metrics[f"head_{i}/loss"] for i in range(n_predict)) / n_predict
    metrics["acceptance_length"] = acceptance_length
    return metrics


def _ratio(total: float, count: float) -> float:
    return float(total) / float(count) if count else 0.0


def normalised_weights(head_loss_weights: HeadLossWeights, n_predict: int) -> list[float]:
    """The weight of each head; they add up to 1.

    Raises:
        ConfigError: the setting is none of those that `speculator_loss` takes.
    """
    if head_loss_weights is None or head_loss_weights == "adaptive":
        return [1.0 / n_predict] * n_predict
    if isinstance(head_loss_weights, Mapping):
        decay = head_loss_weights.get("decay")
        if set(head_loss_weights) != {"decay"} or not _is_number(decay) or not 0 < decay <= 1:
            raise ConfigError(
                "head_loss_weights must be {decay: γ} with a number above 0 and up to 1; "
                f"got {dict(head_loss_weights)}."
            )
        weights = [float(decay) ** i for i in range(n_predict)]
    elif isinstance(head_loss_weights, str) or not all(map(_is_number, head_loss_weights)):
        raise ConfigError(
            f"head_loss_weights must be a list of numbers, {{decay: γ}} or adaptive; got {head_loss_weights!r}."
        )
    else:
        weights = [float(weight) for weight in head_loss_weights]
    if len(weights) != n_predict:
        raise ConfigError(f"head_loss_weights must hold one weight per head ({n_predict}); got {len(weights)}.")
    total = sum(weights)
    if min(weights) < 0 or not 0 < total < float("inf"):
        raise ConfigError(f"head_loss_weights must be finite, not negative and not all zero; got {weights}.")
    return [weight / total for weight in weights]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _related_rows(rows: ChainRows, i: int, head_loss_weights: HeadLossWeights) -> tuple[Tensor, Tensor | None]:
    """For head i the rows of the target's states it is compared with, and its positions' rows in the head before.

    Every head's targets are among those of the first, which alone reach back to the start of a sequence: head i at
    position t has the target of head 0 at t + i.
    """
    positions_N = rows.trained_positions[i]
    target_rows_N = torch.searchsorted(rows.trained_positions[0], positions_N + i)
    if i == 0 or head_loss_weights != "adaptive":
        return target_rows_N, None
    before_M = rows.trained_positions[i - 1]
    found_N = torch.searchsorted(before_M, positions_N)
    is_there_N = torch.isin(positions_N, before_M, assume_unique=True)
    return target_rows_N, torch.where(is_there_N, found_N, -1)


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
