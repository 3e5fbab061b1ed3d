"""Engines with a speculator. Importing this registers those of FSDP with verl."""

import importlib

from verl_speculator.engine.fsdp import FSDPEngineWithLMHeadAndSpeculator
from verl_speculator.engine.policy import FSDPPolicyEngine
from verl_speculator.platforms import cpu

__all__ = ["FSDPEngineWithLMHeadAndSpeculator", "FSDPPolicyEngine", "register_megatron"]


def register_megatron() -> None:
    """Register the Megatron engine, which needs megatron-core, with verl."""
    importlib.import_module(f"verl_speculator.engine.megatron.{'on_cpu' if cpu.is_active() else 'engine'}")
