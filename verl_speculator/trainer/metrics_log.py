"""The log that every run leaves in its own folder: `metrics.jsonl`, one JSON object a line.

    {"step": 0, "metrics": {}, "start": true}             a process has begun, or resumed, after this step
    {"step": 1, "metrics": {"train/loss": 7.9, ...}}      a value that is no finite number is null

A run resumed from an earlier checkpoint goes on in the same file, and its start line takes back what stands above it
for later steps. `verl_speculator.reports.curves` reads the file.
"""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends to `metrics.jsonl`; each line is in the file when the call returns.

    The file is touched by the first line, so a run that fails before it keeps what was there. One process writes.

    Args:
        folder: the run's folder, `trainer.default_local_dir`.
        start_step: the last step done before: 0, or that of the checkpoint from which the run goes on.
    """

    def __init__(self, folder: str | os.PathLike[str], start_step: int) -> None:
        self.path = Path(folder) / METRICS_FILE
        self._start_step = start_step
        self._stream: IO[bytes] | None = None

    def append(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the numbers among `metrics`; other values are left out, and no number at all writes nothing."""
        values = {name: _finite(value) for name, value in metrics.items() if _is_number(value)}
        if not values:
            return
        if self._stream is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _cut_unfinished_line(self.path)
            self._stream = self.path.open("ab", buffering=0)
            self._write({"step": self._start_step, "metrics": {}, "start": True})
        self._write({"step": step, "metrics": values})

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _write(self, line: dict[str, Any]) -> None:
        assert self._stream is not None
        # One call, so that a killed run leaves at most one unfinished line.
        self._stream.write(json.dumps(line, allow_nan=False).encode() + b"\n")


def _is_number(value: Any) -> bool:
    # A bool is no curve; a scalar tensor has no length and turns into a float.
    return (isinstance(value, numbers.Real) and not isinstance(value, bool)) or getattr(value, "ndim", None) == 0


def _finite(value: Any) -> int | float | None:
    number = int(value) if isinstance(value, numbers.Integral) else float(value)
    return number if math.isfinite(number) else None


def _cut_unfinished_line(path: Path) -> None:
    """Drop what a killed run wrote after the last line end."""
    if not path.is_file():
        return
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
