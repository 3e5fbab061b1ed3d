"""Adapter of the Arctic family: ``sum_rnn`` and ``sum_lstm``."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from verl_speculator.adapters.interface import SpeculatorAdapter, packed_logits
from verl_speculator.adapters.settings import base_model_sizes, build_config, check_keys
from verl_speculator.losses import PackedHiddenStates, speculator_loss
from verl_speculator.models import ArcticLSTMSpeculator, ArcticLSTMSpeculatorConfig

SETTINGS = (
    "n_predict",
    "inner_dim",
    "emb_dim",
    "proj_dim",
    "scale_input",
    "tie_weights",
    "tie_lstm_embs",
    "method",
)


class LSTMSpeculatorAdapter(SpeculatorAdapter):
    def validate_settings(self) -> None:
        check_keys(self.settings, SETTINGS)
        # The base's sizes are not known yet; any positive ones let the other values be checked.
        build_config(ArcticLSTMSpeculatorConfig, self.settings, input_hidden_dim=1, vocab_size=1)

    def build_speculator_module(self, model: nn.Module) -> ArcticLSTMSpeculator:
        return ArcticLSTMSpeculator(
            build_config(ArcticLSTMSpeculatorConfig, self.settings, **base_model_sizes(model))
        )

    def get_optimizer_params(self) -> Iterable[nn.Parameter]:
        return self.speculator.parameters()

    def compute_speculator_logits(self, packed: PackedHiddenStates) -> Tensor:
        return packed_logits(self.speculator, packed)

    def compute_speculator_loss(self, packed: PackedHiddenStates) -> tuple[Tensor, dict[str, Tensor]]:
        output = speculator_loss(self.speculator, packed)
        return output.loss, output.metrics
