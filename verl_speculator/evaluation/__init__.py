"""Measuring speculators on a target's prompts; `verl_speculator.reports` draws what was measured.

Names are looked up when they are used: checking a user's input loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verl_speculator.evaluation.results import EvaluationResult
    from verl_speculator.evaluation.run import evaluate
    from verl_speculator.evaluation.settings import EvaluationSettings

_MODULES = {
    "EvaluationResult": "results",
    "EvaluationSettings": "settings",
    "evaluate": "run",
}

__all__ = [
    "EvaluationResult",
    "EvaluationSettings",
    "evaluate",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
