"""EAGLE-3 (Li et al. 2025, arXiv:2503.01840): a small transformer that drafts from three of the base's layers."""

from verl_speculator.algorithms.eagle3.config import Eagle3SpeculatorConfig, Eagle3TrainingArguments
from verl_speculator.algorithms.eagle3.model import Eagle3Speculator

__all__ = ["Eagle3Speculator", "Eagle3SpeculatorConfig", "Eagle3TrainingArguments"]
