"""One training run as a page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from verl_speculator.errors import ConfigError
from verl_speculator.evaluation.curves import Curves, read_curves
from verl_speculator.evaluation.html import render, write_file
from verl_speculator.evaluation.numbers import count, fixed
from verl_speculator.evaluation.scale import short
from verl_speculator.evaluation.training_charts import run_charts

REPORT_FILE = "report.html"


def write_train_report(run_dir: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Path:
    """Plot the run in a file of its own, `report.html` in the run's folder where no other is given; returns it.

    :raises SpeculatorError: the run has no log, an unreadable or an empty one, or the file cannot be written
    """
    run = Path(run_dir)
    curves = read_curves(run)
    charts = run_charts(curves)
    if not charts:
        raise ConfigError(f"{curves.source!r} has none of the curves of a speculator's training: give its run's folder")
    if output is None:
        output = (run if run.is_dir() else run.parent) / REPORT_FILE
    name = run.resolve().name
    page = render(
        "training.html.jinja",
        title=f"Training run: {name}",
        subtitle=f"{count(curves.last_step)} steps logged",
        tiles=_tiles(curves),
        charts=charts,
        source=f"Plotted from {curves.source}",
    )
    try:
        write_file(Path(output), page)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {str(output)!r} ({error.strerror})") from error
    return Path(output)


def _tiles(curves: Curves) -> list[dict[str, Any]]:
    tiles = []
    for what, name, digits in (
        ("Acceptance length, validation", "val/acceptance_length", 2),
        ("Acceptance length, training", "train/acceptance_length", 2),
        ("Loss, validation", "val/loss", 3),
        ("Loss, training", "train/loss", 3),
    ):
        points = curves.points(name)
        if points:
            step, value = points[-1]
            best = (max if "length" in name else min)(points, key=lambda point: point[1])
            more = f"at step {count(step)}; best {fixed(best[1], digits)} at step {count(best[0])}"
            tiles.append({"what": what, "number": fixed(value, digits), "more": more})
    speed = [value for _, value in curves.points("perf/tokens_per_second")]
    if speed:
        mean = sum(speed) / len(speed)
        tiles.append({"what": "Tokens a second", "number": short(mean), "more": f"mean of {count(len(speed))} steps"})
    return tiles
