"""Running out of memory, said in terms of what a user can lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from verl_speculator.errors import ConfigError
from verl_speculator.evaluation.settings import EvaluationSettings


@contextmanager
def explain_out_of_memory(doing: str, settings: EvaluationSettings, advice: str | None = None) -> Iterator[None]:
    """Turn running out of memory inside it into a `ConfigError` of one sentence; `advice` says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if advice is None:
            advice = _flags_to_lower(settings)
        raise ConfigError(f"out of memory while {doing}: {advice}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """torch has a type for it on accelerators and only a message on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text or "cannot allocate memory" in text


def _flags_to_lower(settings: EvaluationSettings) -> str:
    if settings.batch_size > 1:
        return f"lower --batch-size={settings.batch_size}, then --max-new-tokens={settings.max_new_tokens}"
    return f"lower --max-new-tokens={settings.max_new_tokens}, or use --dtype bfloat16"
