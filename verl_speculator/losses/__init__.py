"""Objectives of speculator training: token alignment on packed sequences and a cross entropy without stored logits."""

from verl_speculator.losses.acceptance import acceptance_metrics, acceptance_sums, rounds_per_sequence
from verl_speculator.losses.alignment import (
    count_trained_positions,
    head_inputs,
    head_targets,
    trained_positions,
)
from verl_speculator.losses.linear_cross_entropy import LinearCrossEntropyOutput, linear_cross_entropy
from verl_speculator.losses.objective import (
    SpeculatorLoss,
    count_loss_rows,
    normalised_weights,
    speculator_loss,
    speculator_metrics,
)
from verl_speculator.losses.packed import PackedHiddenStates
from verl_speculator.losses.soft_targets import Objective, TargetHead, soft_target_loss

__all__ = [
    "LinearCrossEntropyOutput",
    "Objective",
    "PackedHiddenStates",
    "SpeculatorLoss",
    "TargetHead",
    "acceptance_metrics",
    "acceptance_sums",
    "count_loss_rows",
    "count_trained_positions",
    "head_inputs",
    "head_targets",
    "linear_cross_entropy",
    "normalised_weights",
    "rounds_per_sequence",
    "soft_target_loss",
    "speculator_loss",
    "speculator_metrics",
    "trained_positions",
]
