from verl_speculator.checkpoint.training_state import (
    load_speculator,
    load_training_state,
    save_speculator,
    save_training_state,
    whole_state_dict,
)

__all__ = [
    "load_speculator",
    "load_training_state",
    "save_speculator",
    "save_training_state",
    "whole_state_dict",
]
