"""Adapter of the MLP speculator."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from verl_speculator.adapters import lstm_adapter
from verl_speculator.adapters.interface import SpeculatorAdapter, packed_logits
from verl_speculator.adapters.settings import SECTION, base_model_sizes, build_config, check_keys
from verl_speculator.errors import ConfigError
from verl_speculator.losses import PackedHiddenStates, speculator_loss
from verl_speculator.models import MLPSpeculator, MLPSpeculatorConfig

SETTINGS = ("n_predict", "inner_dim", "scale_input", "tie_weights")

# The shared configuration file has these keys with these defaults; here they mean nothing, so only the defaults pass.
_FOREIGN_DEFAULTS = {"emb_dim": 1024, "proj_dim": 1024, "tie_lstm_embs": False, "method": "sum_rnn"}


class MLPSpeculatorAdapter(SpeculatorAdapter):
    def validate_settings(self) -> None:
        check_keys(self.settings, lstm_adapter.SETTINGS)
        for key, default in _FOREIGN_DEFAULTS.items():
            if self.settings.get(key, default) not in (default, self.settings.get("inner_dim")):
                raise ConfigError(f"{SECTION}.{key} has no meaning for the MLP speculator: leave it out, set inner_dim")
        build_config(MLPSpeculatorConfig, self._own_settings(), input_hidden_dim=1, vocab_size=1)

    def build_speculator_module(self, model: nn.Module) -> MLPSpeculator:
        return MLPSpeculator(build_config(MLPSpeculatorConfig, self._own_settings(), **base_model_sizes(model)))

    def get_optimizer_params(self) -> Iterable[nn.Parameter]:
        return self.speculator.parameters()

    def compute_speculator_logits(self, packed: PackedHiddenStates) -> Tensor:
        return packed_logits(self.speculator, packed)

    def compute_speculator_loss(self, packed: PackedHiddenStates) -> tuple[Tensor, dict[str, Tensor]]:
        output = speculator_loss(self.speculator, packed)
        return output.loss, output.metrics

    def _own_settings(self) -> dict[str, Any]:
        return {key: self.settings[key] for key in SETTINGS if key in self.settings}
