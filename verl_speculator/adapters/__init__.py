from verl_speculator.adapters.chain_adapter import ChainSpeculatorAdapter
from verl_speculator.adapters.finding import build_speculator_adapter, load_adapter_class
from verl_speculator.adapters.interface import SpeculatorAdapter
from verl_speculator.adapters.lstm_adapter import LSTMSpeculatorAdapter
from verl_speculator.adapters.mlp_adapter import MLPSpeculatorAdapter
from verl_speculator.adapters.model_adapter import ModelAdapter
from verl_speculator.adapters.needs import AdapterNeeds

__all__ = [
    "AdapterNeeds",
    "ChainSpeculatorAdapter",
    "LSTMSpeculatorAdapter",
    "MLPSpeculatorAdapter",
    "ModelAdapter",
    "SpeculatorAdapter",
    "build_speculator_adapter",
    "load_adapter_class",
]
