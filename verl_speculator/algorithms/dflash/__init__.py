"""DFlash (Chen et al. 2026, arXiv:2602.06036): a block-diffusion drafter that proposes all tokens in one pass."""

from verl_speculator.algorithms.dflash.config import DFlashSpeculatorConfig, DFlashTrainingArguments
from verl_speculator.algorithms.dflash.model import DFlashSpeculator

__all__ = ["DFlashSpeculator", "DFlashSpeculatorConfig", "DFlashTrainingArguments"]
