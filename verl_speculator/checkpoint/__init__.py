"""Checkpoints of a run. Names of ``training_state`` load it on first use: it costs seconds, ``layout`` nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from verl_speculator.checkpoint import training_state

    return getattr(training_state, name)
