"""The formula that speculator trainers use today: the logits of all heads at all positions as one tensor.

Benchmarks compare with it, in `bench_loss.py` as a function and in `bench_step.py` as an adapter of a whole training.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from verl_speculator.adapters import LSTMSpeculatorAdapter, MLPSpeculatorAdapter
from verl_speculator.losses import PackedHiddenStates, trained_positions
from verl_speculator.models import ChainSpeculator


def chain_outputs(speculator: ChainSpeculator, packed: PackedHiddenStates) -> Iterator[Tensor]:
    """Each head's outputs at all positions: [T, width]. Tokens beyond the end of a sequence are never trained."""
    # Each head reads its embeddings by itself, as the trainers that the formula comes from do.
    embedded = (speculator.embed(packed.input_ids.roll(-1 - i), i) for i in range(speculator.n_predict))
    return speculator.unroll(packed.hidden_states, embedded)


def stacked_loss(speculator: ChainSpeculator, packed: PackedHiddenStates) -> Tensor:
    """The unweighted mean over heads of each head's mean cross entropy over its trained positions."""
    trained_PT = trained_positions(packed.loss_mask, packed.cu_seqlens, speculator.n_predict)
    counts_P = trained_PT.sum(dim=1) if packed.head_counts is None else packed.head_counts
    outputs = enumerate(chain_outputs(speculator, packed))
    logits_PTV = torch.stack([F.linear(output, speculator.head_weight(i)) for i, output in outputs])
    losses = []
    for i, trained_T in enumerate(trained_PT):
        labels_T = packed.input_ids.roll(-2 - i).masked_fill(~trained_T, -100)
        losses.append(F.cross_entropy(logits_PTV[i], labels_T, reduction="sum") / counts_P[i].clamp(min=1))
    return torch.stack(losses).mean()


class _StackedLoss:
    speculator: ChainSpeculator

    def compute_speculator_loss(self, packed: PackedHiddenStates) -> tuple[Tensor, dict[str, Tensor]]:
        return stacked_loss(self.speculator, packed), {}


class StackedMLPAdapter(_StackedLoss, MLPSpeculatorAdapter):
    """The MLP speculator, trained with the stacked formula."""


class StackedLSTMAdapter(_StackedLoss, LSTMSpeculatorAdapter):
    """The Arctic family, trained with the stacked formula."""
