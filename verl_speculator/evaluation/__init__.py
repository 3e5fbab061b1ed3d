"""Measuring speculators on a target's prompts, and reports of it.

Names are looked up when they are used: checking a user's input loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verl_speculator.evaluation.report import write_report
    from verl_speculator.evaluation.results import EvaluationResult
    from verl_speculator.evaluation.run import evaluate
    from verl_speculator.evaluation.settings import EvaluationSettings
    from verl_speculator.evaluation.table import format_table
    from verl_speculator.evaluation.train_report import write_train_report

_MODULES = {
    "EvaluationResult": "results",
    "EvaluationSettings": "settings",
    "evaluate": "run",
    "format_table": "table",
    "write_report": "report",
    "write_train_report": "train_report",
}

__all__ = [
    "EvaluationResult",
    "EvaluationSettings",
    "evaluate",
    "format_table",
    "write_report",
    "write_train_report",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
