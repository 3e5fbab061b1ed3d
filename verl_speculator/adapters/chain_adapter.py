"""The adapter of speculators that draft as :class:`Speculator` does: one head after the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from verl_speculator.adapters.interface import SpeculatorAdapter
from verl_speculator.adapters.settings import base_model_sizes, build_config, own_settings
from verl_speculator.losses import PackedHiddenStates, acceptance_sums, head_inputs, speculator_loss
from verl_speculator.models import Speculator, SpeculatorConfig


class ChainSpeculatorAdapter(SpeculatorAdapter):
    """Needs a configuration class only: its fields are the settings, and its registered model is what trains.

    A setting that is a field of ``config_class`` and not in the run's configuration file is given as
    ``+model.speculator.KEY=VALUE``.
    """

    config_class: ClassVar[type[SpeculatorConfig]]

    def validate_settings(self) -> None:
        # The base's sizes are not known yet; any positive ones let the other values be checked.
        self._build_config(input_hidden_dim=1, vocab_size=1)

    def build_speculator_module(self, model: nn.Module) -> Speculator:
        return self.speculator_class.from_config(self._build_config(**base_model_sizes(model)))

    def get_optimizer_params(self) -> Iterable[nn.Parameter]:
        return self.speculator.parameters()

    def compute_speculator_logits(self, packed: PackedHiddenStates) -> Tensor:
        """Teacher-forced with the batch's own tokens; a head that would read past the end has no meaningful logits."""
        position_T = torch.arange(packed.num_tokens, device=packed.input_ids.device)
        state = self.speculator.begin(packed.hidden_states)
        logits = []
        for head in range(self.speculator.n_predict):
            state, output_TD = self.speculator.step(state, head_inputs(packed.input_ids, position_T, head), head)
            logits.append(output_TD @ self.speculator.head_weight(head).T)
        return torch.stack(logits)

    def compute_speculator_loss(self, packed: PackedHiddenStates) -> tuple[Tensor, dict[str, Tensor]]:
        output = speculator_loss(self.speculator, packed)
        return output.loss, output.metrics

    def measure_acceptance(self, packed: PackedHiddenStates) -> dict[str, Tensor]:
        return acceptance_sums(self.speculator, packed)

    def _build_config(self, **sizes: Any) -> SpeculatorConfig:
        return build_config(self.config_class, own_settings(self.config_class, self.settings), **sizes)
