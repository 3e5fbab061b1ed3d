"""Windows by hand."""

from __future__ import annotations

from pathlib import Path

from verl_speculator.scorer.config import SCALARS
from verl_speculator.scorer.windows import UNKNOWN, Window, write_windows

SCALAR_NAMES = SCALARS


def make_window(
    context: list[int],
    drafts: list[int],
    targets: list[int],
    *,
    prompt_index: int = 0,
    strict_correct: bool = True,
    correct: list[int] | None = None,
    answer: str = "12",
) -> Window:
    """A window whose scalars are numbers that tell slots apart."""
    scalars = [[slot + name / 10 for name in range(len(SCALAR_NAMES))] for slot in range(len(drafts))]
    return Window(
        input_ids=context + drafts,
        draft_start_idx=len(context),
        prompt_length=min(len(context), 3),
        target_ids=targets,
        scalars=scalars,
        prompt_index=prompt_index,
        answer=answer,
        strict_correct=strict_correct,
        strict_calls=6,
        labels=[UNKNOWN] * len(drafts),
        correct=correct or [UNKNOWN] * len(drafts),
    )


def write_window_file(path: Path, windows: list[Window]) -> Path:
    write_windows(path, windows, SCALAR_NAMES, {"made": "by hand"})
    return path
