"""Adapter of the Arctic family: `sum_rnn` and `sum_lstm`."""

from __future__ import annotations

from verl_speculator.adapters.chain_adapter import ChainSpeculatorAdapter
from verl_speculator.models import ArcticLSTMSpeculator, ArcticLSTMSpeculatorConfig


class LSTMSpeculatorAdapter(ChainSpeculatorAdapter):
    config_class = ArcticLSTMSpeculatorConfig
    speculator_class = ArcticLSTMSpeculator
