"""What speculative decoding would accept along a given text, without decoding anything.

The text stands for the target's own output. Its tokens are then what verification compares the drafts with, so one
teacher-forced pass tells for every position which drafts a round that starts there would keep. Decoding does not start
a round everywhere: one that keeps `a` drafts is followed by one `a + 1` tokens further on, and easy stretches, where
drafts are long, hold fewer rounds than tokens. `closed_loop_acceptance_length` follows those jumps from the first token
of each answer, and so is what decoding reports, exactly for greedy decoding of the target's own greedy text.

Sampled verification (Leviathan et al. 2023, arXiv:2211.17192) keeps a draft drawn from q with probability
`min(1, p(x)/q(x))`: of all drafts, `Σ min(p, q)`. Seen from the text, whose token x was drawn from p, the chance that x
came from an accepted draft is `min(p, q)(x) / p(x) = min(1, q(x)/p(x))`, which carries a prefix on to the next token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from verl_speculator.losses.alignment import head_inputs, head_targets, trained_positions
from verl_speculator.losses.packed import PackedHiddenStates
from verl_speculator.models import ChainSpeculator

_CHUNK_ROWS = 256
_READS_AS_SAMPLED = 1.25


class _Drafts(NamedTuple):
    """What every head does at every position; 0 where a round cannot start or the head's target is not in the answer.

    Attributes:
        keeps_PT: [n_predict, T], 1 where a greedy draft is the text's token.
        follows_PT: [n_predict, T], the chance `min(1, q(x)/p(x))` that a sampled draft led to the text's token.
        overlap_PT: [n_predict, T], `Σ min(p, q)`.
        surprise_PT: [n_predict, T], `-log p(x)` of the text's token.
        entropy_PT: [n_predict, T], what that is on average for a token drawn from p.
        outside_PT: [n_predict, T], the share of p on tokens that cannot be drafted.
    """

    keeps_PT: Tensor
    follows_PT: Tensor
    overlap_PT: Tensor
    surprise_PT: Tensor
    entropy_PT: Tensor
    outside_PT: Tensor


@torch.no_grad()
def acceptance_sums(speculator: ChainSpeculator, packed: PackedHiddenStates) -> dict[str, Tensor]:
    """Sums for `acceptance_metrics`, which may be added over batches and ranks; sequences must be whole.

    Sampled verification is measured, at temperature 1, where `packed.base_head` gives the target's distribution.
    Logits of both models exist for a few hundred rows at a time.
    """
    starts_T = _round_starts(packed.loss_mask, packed.cu_seqlens)
    trained_PT = trained_positions(packed.loss_mask, packed.cu_seqlens, speculator.n_predict)
    # A gap in the answer ends it for the drafts that would reach across.
    inside_PT = (trained_PT & starts_T).cumprod(dim=0).bool()
    drafts = _teacher_forced(speculator, packed, inside_PT)

    sums = _closed_loop_sums("closed_loop", drafts.keeps_PT, inside_PT)
    if packed.base_head is not None:
        sums |= _closed_loop_sums("closed_loop_sampled", drafts.follows_PT, inside_PT)
        reached_PT = torch.cat([torch.ones_like(drafts.follows_PT[:1]), drafts.follows_PT[:-1].cumprod(dim=0)])
        for i, overlap in enumerate((reached_PT * drafts.overlap_PT * inside_PT).sum(dim=1)):
            sums[f"overlap_{i}/sum"] = overlap
            sums[f"overlap_{i}/count"] = inside_PT[i].sum().float()
        sums["text/surprise"], sums["text/entropy"] = drafts.surprise_PT[0].sum(), drafts.entropy_PT[0].sum()
        if speculator.draft_ids is not None:
            sums["text/mass_outside"] = drafts.outside_PT[0].sum()
    return sums


@torch.no_grad()
def rounds_per_sequence(speculator: ChainSpeculator, packed: PackedHiddenStates) -> Tensor:
    """[B, 2], float64: the rounds in which greedy drafts write each answer, and how many drafts they keep.

    Exactly what decoding counts where it drafts greedily and the text is its own output, sampled or not: a kept draft
    is the text's token, and in place of one that is not kept verification draws another token.
    """
    starts_T = _round_starts(packed.loss_mask, packed.cu_seqlens)
    trained_PT = trained_positions(packed.loss_mask, packed.cu_seqlens, speculator.n_predict)
    inside_PT = (trained_PT & starts_T).cumprod(dim=0).bool()
    alone = dataclasses.replace(packed, target_head=None, lm_head_weight=None)
    counts_T2 = torch.stack(_closed_loop(_teacher_forced(speculator, alone, inside_PT).keeps_PT, inside_PT), dim=1)
    lengths_B = packed.cu_seqlens.diff()
    index_T = torch.arange(len(lengths_B), device=lengths_B.device).repeat_interleave(lengths_B)
    totals_B2 = torch.zeros(len(lengths_B), 2, dtype=torch.float64, device=counts_T2.device)
    return totals_B2.index_add_(0, index_T.to(counts_T2.device), counts_T2.double())


def acceptance_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Divide the totals of `acceptance_sums` once; what was not measured is left out.

    Returns:
        `closed_loop_acceptance_length` and `closed_loop_sampled_acceptance_length`: tokens per target forward that
        decoding this text yields, `1 + accepted / rounds`. `sampled_acceptance_length`: `1 + Σ_i` of the mean over all
        positions of the chance that drafts 0 to i are kept at temperature 1. `surprise_over_entropy`: near 1 where the
        text is as likely as one sampled from the target. Greedy answers lie far below it, and what sampling would
        accept cannot be told from them: the two sampled lengths are then left out. With a draft vocabulary
        `mass_outside_draft_vocabulary`: the target's probability of tokens that cannot be drafted.
    """
    metrics = {}
    if sums.get("closed_loop/rounds"):
        metrics["closed_loop_acceptance_length"] = _per_round(sums, "closed_loop")
    if sums.get("text/entropy"):
        metrics["surprise_over_entropy"] = sums["text/surprise"] / sums["text/entropy"]
        if "text/mass_outside" in sums:
            metrics["mass_outside_draft_vocabulary"] = sums["text/mass_outside"] / sums["overlap_0/count"]
        if 1 / _READS_AS_SAMPLED < metrics["surprise_over_entropy"] < _READS_AS_SAMPLED:
            metrics["closed_loop_sampled_acceptance_length"] = _per_round(sums, "closed_loop_sampled")
            heads = sum(key.startswith("overlap_") and key.endswith("/count") for key in sums)
            shares = [sums[f"overlap_{i}/sum"] / max(sums[f"overlap_{i}/count"], 1.0) for i in range(heads)]
            metrics["sampled_acceptance_length"] = 1.0 + sum(shares)
    return metrics


def _per_round(sums: Mapping[str, float], name: str) -> float:
    return 1.0 + sums[f"{name}/accepted"] / sums[f"{name}/rounds"]


def _round_starts(loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[T], bool: the position's next token is in an answer, so decoding may have it as the last token of a round."""
    next_is_answer_T = torch.zeros_like(loss_mask, dtype=torch.bool)
    next_is_answer_T[:-1] = loss_mask[1:] == 1
    is_last_T = torch.zeros_like(next_is_answer_T)
    ends_B = cu_seqlens[1:].to(loss_mask.device)
    is_last_T[ends_B[ends_B > 0] - 1] = True
    return next_is_answer_T & ~is_last_T


def _teacher_forced(speculator: ChainSpeculator, packed: PackedHiddenStates, inside_PT: Tensor) -> _Drafts:
    columns = _Drafts(*(torch.zeros(inside_PT.shape, device=inside_PT.device) for _ in _Drafts._fields))
    # Every head runs, on no rows if there are none: a sharded speculator's ranks must not wait for one another.
    for positions_N in inside_PT[0].nonzero().squeeze(1).split(_CHUNK_ROWS):
        tokens = [head_inputs(packed.input_ids, positions_N, i) for i in range(speculator.n_predict)]
        outputs = speculator.unroll(packed.hidden_states[positions_N], speculator.embed_all(tokens))
        for i, outputs_ND in enumerate(outputs):
            _measure_rows(speculator, packed, positions_N, outputs_ND, i, columns)
    return _Drafts(*(column * inside_PT for column in columns))


def _measure_rows(
    speculator: ChainSpeculator,
    packed: PackedHiddenStates,
    positions_N: Tensor,
    outputs_ND: Tensor,
    head_index: int,
    columns: _Drafts,
) -> None:
    targets_N = head_targets(packed.input_ids, positions_N, head_index)
    draft_logits_NV = outputs_ND @ speculator.head_weight(head_index).T
    drafts_N = speculator.to_target_ids(draft_logits_NV.argmax(dim=1))
    columns.keeps_PT[head_index, positions_N] = (drafts_N == targets_N).float()
    head = packed.base_head
    if head is None:
        return
    # Head i's target is the token that the target model predicts i + 1 positions further on.
    target_positions_N = (positions_N + head_index + 1).clamp(max=packed.num_tokens - 1)
    states_NH = packed.hidden_states[target_positions_N].to(head.weight.dtype)
    target_logits_NV = head.logits(states_NH, torch.promote_types(states_NH.dtype, torch.float32))
    draft_NV = speculator.to_target_logits(draft_logits_NV.float().log_softmax(dim=1))
    target_NV = target_logits_NV.float().log_softmax(dim=1)
    columns.overlap_PT[head_index, positions_N] = torch.minimum(draft_NV, target_NV).exp().sum(dim=1)
    draft_N, target_N = (part.gather(1, targets_N[:, None]).squeeze(1) for part in (draft_NV, target_NV))
    columns.follows_PT[head_index, positions_N] = (draft_N - target_N).clamp(max=0).exp()
    columns.surprise_PT[head_index, positions_N] = -target_N
    columns.entropy_PT[head_index, positions_N] = -(target_NV.exp() * target_NV).sum(dim=1)
    if speculator.draft_ids is not None:
        inside_N = target_NV.index_select(1, speculator.draft_ids).exp().sum(dim=1)
        columns.outside_PT[head_index, positions_N] = 1 - inside_N


def _closed_loop_sums(name: str, chance_PT: Tensor, inside_PT: Tensor) -> dict[str, Tensor]:
    rounds_T, accepted_T = _closed_loop(chance_PT, inside_PT)
    return {f"{name}/rounds": rounds_T.sum(), f"{name}/accepted": accepted_T.sum()}


def _closed_loop(chance_PT: Tensor, inside_PT: Tensor) -> tuple[Tensor, Tensor]:
    """[T] each: expected rounds that start at a position, and the drafts that these keep.

    Draft i is kept with chance `chance_PT[i]` if those before it are.
    """
    kept_PT = chance_PT.cumprod(dim=0)
    # [n_predict + 1, T]: the chance that a round keeps exactly so many.
    exactly = -torch.diff(kept_PT, dim=0, prepend=torch.ones_like(kept_PT[:1]), append=torch.zeros_like(kept_PT[:1]))
    visits_T = torch.tensor(_visits(inside_PT[0].tolist(), exactly.T.tolist()), device=kept_PT.device)
    return visits_T, visits_T * kept_PT.sum(dim=0)


def _visits(is_round: list[bool], exactly: list[list[float]]) -> list[float]:
    """How often a round starts at each position, when one starts at the first of each answer.

    A round never leads into another answer: its drafts end with its own, and the next one's first round is further on.
    """
    visits = [0.0] * len(is_round)
    for position, chances in enumerate(exactly):
        if not is_round[position]:
            visits[position] = 0.0
            continue
        if position == 0 or not is_round[position - 1]:
            visits[position] = 1.0
        for kept, chance in enumerate(chances[: len(visits) - position - 1]):
            visits[position + kept + 1] += visits[position] * chance
    return visits
