"""An adapter that asks for everything an engine can give, and whose loss is wrong if any of it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from verl_speculator.adapters import AdapterNeeds, LSTMSpeculatorAdapter
from verl_speculator.losses import PackedHiddenStates

# Embeddings, the stream between the two layers of the tiny models, and what comes out of the last one.
LAYER_IDS = (2, 0, 1)
NEEDY = f"model.speculator_adapter={{path: {__file__}, name: NeedyAdapter}}"


class NeedyAdapter(LSTMSpeculatorAdapter):
    """The LSTM's loss, and a cross entropy between the base's distribution and one made of the states of its layers."""

    @property
    def needs(self) -> AdapterNeeds:
        return AdapterNeeds(
            aux_hidden_state_layer_ids=LAYER_IDS, whole_sequences=True, target_head_weight=True, position_ids=True
        )

    def compute_speculator_loss(self, packed: PackedHiddenStates) -> tuple[Tensor, dict[str, Tensor]]:
        loss, sums = super().compute_speculator_loss(packed)
        assert packed.aux_hidden_states is not None
        assert packed.position_ids is not None
        assert packed.lm_head_weight is not None
        assert packed.head_counts is not None
        soft = loss * 0
        for start, stop in zip(packed.cu_seqlens[:-1].tolist(), packed.cu_seqlens[1:].tolist(), strict=True):
            soft = soft + soft_loss(
                packed.hidden_states[start:stop],
                list(packed.aux_hidden_states[start:stop].chunk(len(LAYER_IDS), dim=1)),
                packed.position_ids[start:stop],
                packed.loss_mask[start:stop],
                packed.lm_head_weight,
            )
        return loss + soft / packed.head_counts[0].clamp(min=1), sums


def soft_loss(last: Tensor, layers: list[Tensor], positions: Tensor, mask: Tensor, weight: Any) -> Tensor:
    """The sum over a sequence's trained tokens; every one looks back over the trained tokens of its sequence."""
    mixed = sum((index + 1) * states for index, states in enumerate(layers))
    seen = (mixed * mask[:, None]).cumsum(dim=0) / (1 + positions[:, None])
    student = (seen * torch.cos(positions)[:, None]) @ weight.T
    target = (last @ weight.T).softmax(dim=-1)
    return -(target * student.log_softmax(dim=-1)).sum(dim=-1) @ mask.to(student.dtype)
