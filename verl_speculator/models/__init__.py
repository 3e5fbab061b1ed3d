"""Speculator models and their files; needs torch and safetensors only."""

from verl_speculator.models.base import Speculator, register_speculator
from verl_speculator.models.config import SpeculatorConfig
from verl_speculator.models.lstm_speculator import ArcticLSTMSpeculator, ArcticLSTMSpeculatorConfig
from verl_speculator.models.mlp_speculator import MLPSpeculator, MLPSpeculatorConfig

__all__ = [
    "ArcticLSTMSpeculator",
    "ArcticLSTMSpeculatorConfig",
    "MLPSpeculator",
    "MLPSpeculatorConfig",
    "Speculator",
    "SpeculatorConfig",
    "register_speculator",
]
