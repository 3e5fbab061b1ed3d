"""Adapter of the MLP speculator."""

from __future__ import annotations

from verl_speculator.adapters.chain_adapter import ChainSpeculatorAdapter
from verl_speculator.models import MLPSpeculator, MLPSpeculatorConfig


class MLPSpeculatorAdapter(ChainSpeculatorAdapter):
    config_class = MLPSpeculatorConfig
    speculator_class = MLPSpeculator
