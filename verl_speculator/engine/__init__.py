"""Engines with a speculator. Importing this registers them with verl."""

from verl_speculator.engine.fsdp import FSDPEngineWithLMHeadAndSpeculator

__all__ = ["FSDPEngineWithLMHeadAndSpeculator"]
