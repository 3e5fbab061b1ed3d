"""Reading what a training run logged: our `metrics.jsonl`, the file of verl's `file` logger, TensorBoard events."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_speculator.errors import DataError, MissingFileError
from verl_speculator.trainer.metrics_log import METRICS_FILE

_EVENTS = "events.out.tfevents*"


@dataclass
class Curves:
    """Values over steps: `values[name][step]`, steps ascending; a value that was no finite number is None."""

    source: str
    values: dict[str, dict[int, float | None]] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        return max((step for points in self.values.values() for step in points), default=0)

    def points(self, name: str) -> list[tuple[int, float]]:
        """The finite points of a curve; none for a name that was never logged."""
        return [(step, value) for step, value in self.values.get(name, {}).items() if value is not None]

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in self.values if name.startswith(prefix))


def read_curves(path: str | os.PathLike[str]) -> Curves:
    """The curves of a run's folder, of a log file, or of a folder of TensorBoard events.

    Raises:
        MissingFileError: Nothing of that kind is there.
        DataError: A line is not readable, or no value was logged.
    """
    where = Path(path)
    if where.is_file():
        curves = _read_lines(where)
    elif (where / METRICS_FILE).is_file():
        curves = _read_lines(where / METRICS_FILE)
    elif where.is_dir() and any(where.glob(_EVENTS)):
        curves = _read_events(where)
    elif where.is_dir():
        raise MissingFileError(f"{str(where)!r} holds no {METRICS_FILE} and no TensorBoard events: give a run's folder")
    else:
        raise MissingFileError(f"there is no folder or file {str(where)!r}: give a training run's folder")
    if not curves.values:
        raise DataError(f"{curves.source!r} has no values yet: the run has not logged a step")
    return curves


def find_run(speculator: str | os.PathLike[str]) -> Path | None:
    """The folder of the run that a speculator's checkpoint lies in, if its log is still there."""
    if not Path(speculator).exists():
        return None  # a name on the hub
    folder = Path(speculator).resolve()
    # RUN/global_step_N/speculator, RUN/global_step_N, or a speculator that was moved next to the log.
    return next((run for run in (folder, *folder.parents[:2]) if (run / METRICS_FILE).is_file()), None)


def _read_lines(file: Path) -> Curves:
    curves = Curves(str(file))
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            step, metrics = _checked(entry)
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break  # a run that was killed, or is going on, may leave an unfinished line
            raise DataError(f"{str(file)!r}, line {number}, is not a line of a metrics log") from error
        if entry.get("start"):
            _take_back(curves, step)
        for name, value in metrics.items():
            curves.values.setdefault(name, {})[step] = value
    return _in_order(curves)


def _checked(entry: Any) -> tuple[int, dict[str, float | None]]:
    step = entry["step"]
    metrics = entry["metrics"] if "metrics" in entry else entry["data"]  # verl's file logger says data
    if not isinstance(step, int) or not isinstance(metrics, dict):
        raise TypeError
    return step, {name: _number(value) for name, value in metrics.items() if not isinstance(value, str | bool | list)}


def _number(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _take_back(curves: Curves, start_step: int) -> None:
    """A run that starts after `start_step` does the later steps anew; one that starts at 0 does everything anew."""
    for name, points in curves.values.items():
        curves.values[name] = {step: value for step, value in points.items() if step <= start_step and start_step > 0}


def _in_order(curves: Curves) -> Curves:
    curves.values = {name: dict(sorted(points.items())) for name, points in curves.values.items() if points}
    return curves


def _read_events(folder: Path) -> Curves:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise MissingFileError(
            f"{str(folder)!r} holds TensorBoard events, and reading them needs tensorboard: pip install tensorboard"
        ) from error
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    curves = Curves(str(folder))
    for name in events.Tags()["scalars"]:
        # In the order in which they were written, so that a resumed run's value of a step replaces the earlier one.
        points = sorted(events.Scalars(name), key=lambda point: point.wall_time)
        curves.values[name] = {point.step: _number(point.value) for point in points}
    return _in_order(curves)
