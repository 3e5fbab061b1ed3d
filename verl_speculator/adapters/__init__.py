from verl_speculator.adapters.chain_adapter import ChainSpeculatorAdapter
from verl_speculator.adapters.interface import SpeculatorAdapter, build_speculator_adapter, load_adapter_class
from verl_speculator.adapters.lstm_adapter import LSTMSpeculatorAdapter
from verl_speculator.adapters.mlp_adapter import MLPSpeculatorAdapter
from verl_speculator.adapters.needs import AdapterNeeds

__all__ = [
    "AdapterNeeds",
    "ChainSpeculatorAdapter",
    "LSTMSpeculatorAdapter",
    "MLPSpeculatorAdapter",
    "SpeculatorAdapter",
    "build_speculator_adapter",
    "load_adapter_class",
]
