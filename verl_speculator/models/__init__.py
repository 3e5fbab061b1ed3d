"""Speculator models and their files; needs torch and safetensors only."""

from verl_speculator.models.chain import ChainSpeculator, ChainSpeculatorConfig
from verl_speculator.models.config import SpeculatorConfig, SpeculatorConfigBase
from verl_speculator.models.lstm_speculator import ArcticLSTMSpeculator, ArcticLSTMSpeculatorConfig
from verl_speculator.models.mlp_speculator import MLPSpeculator, MLPSpeculatorConfig
from verl_speculator.models.speculator import Speculator, register_speculator

__all__ = [
    "ArcticLSTMSpeculator",
    "ArcticLSTMSpeculatorConfig",
    "ChainSpeculator",
    "ChainSpeculatorConfig",
    "MLPSpeculator",
    "MLPSpeculatorConfig",
    "Speculator",
    "SpeculatorConfig",
    "SpeculatorConfigBase",
    "register_speculator",
]
